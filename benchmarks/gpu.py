"""LLM.int8() on a GPU: measured where there is one, modelled where there is none.

    python benchmarks/gpu.py            # writes benchmarks/gpu.md: headed as a model, or as measured
    python benchmarks/gpu.py --rehearse # runs the measuring half once, on the CPU

The unit is a norm and the linears that read it, at the shapes of Llama-3-8B. Measured is against the
same module in fp16 under torch.compile, and against bitsandbytes and torchao when they are installed.
No machine with a GPU was there to write it on: the measuring half has run in rehearsal alone.
"""

import argparse
import copy
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_suffix(".md")

# Linears that read one activation: name, widths N, and K.
LAYERS = (
    ("q/k/v", (4096, 1024, 1024), 4096),
    ("o", (4096,), 4096),
    ("gate/up", (14336, 14336), 4096),
    ("down", (4096,), 14336),
)
TOKENS = (1, 16, 128, 512, 4096)
OUTLIERS = 32
_NORM = "rms"

MODELLED = """\
# LLM.int8() on a GPU: a model, not a measurement

Written by `python benchmarks/gpu.py` on a machine without a GPU, from the compiled kernels and data
sheets (`benchmarks/gpu_model.py` has the formula and every constant). A norm and the linears that read
it, at Llama-3-8B's shapes, with {outliers} outlier columns in which every row has an outlier;
microseconds inside a CUDA graph, of the column and of the token decomposition, and how many times
as fast as *fp16*: a norm, and cuBLAS without any tile effect. It ranks configurations; do not quote it
as speed.

*Limited by* names what most of the time of the column decomposition's product goes into. L2: a tile of
128 x 256 reads 384 bytes for every 32,768 products, and Triton 3.9 has no multicast to share them
between processors: with `num_ctas=2` and 256 x 256 for two of them, by pointers as by TMA descriptors,
there is none in the PTX, and each keeps the whole of one operand in its shared memory. *192x256* is a
mix of tall tiles and of 128 x 256 (`kernels/gpu/tall.py`): 448 bytes for every 49,152. *Quantising* is
what each program of the decode kernel does for itself at 2 to 16 tokens. Loads that wait for one
another are counted in full on top of everything else: in what gathers (the witness of a column, the
outlier that it names, the list, what it lists), and at the end of a product that is split. The
instructions of a norm are those of our kernel (`kernels/gpu/norm.py`), compiled for each GPU. Of fp16,
of up to 16 tokens, and without outliers they are those of the code that Inductor generates for an H100
(`int8fx/testing/gpuless/norm_kernels.py`). AMD's are not modelled.

Not in the model, either: Triton leaves no int8 product in flight on an H100. It waits once in a step
of a short tile, and twice in one of a tall tile, which is 1.5 times as much work. By an estimate, 70 to
100 cycles for each wait, beyond the share of the tensor cores' rate that all products get, would undo
what tall tiles gain for q/k/v and o. `mode="max-autotune"` tries both.

| GPU | linears | tokens | fp16 | column | ratio | token | ratio | configuration | limited by |
|---|---|---|---|---|---|---|---|---|---|
"""
FEW = """
## Where the time goes at few tokens on {gpu}

The launches of the two decompositions, and what limits each, in microseconds. At 128 tokens most
products read their weight at the speed of memory; what is left is three gaps between launches, loads
that wait for one another, and the list of the columns that each program makes. At 512 it is the traffic
of L2, or tiles of 128 x 256 that do not fill the last round of processors.

| tokens | linears | | norm | gather | product |
|---|---|---|---|---|---|
{launches}
"""
FLOORS = """
## Where the time goes at {tokens} tokens on {gpu}

The launches of the two decompositions, and what limits each, in microseconds:

| linears | | norm | gather | product |
|---|---|---|---|---|
{launches}

And over fp16: both; without outliers (threshold 0); the column decomposition with a product as fast as
the tensor cores are (no tile effects, no L2).

What limits the column decomposition at o: every row has a say in which columns are outliers, so that
x is read twice, 5 bytes an element before the product instead of 3, and N is small: there are few
products for each of these bytes. They take 30 us with what is gathered, and tiles of these two heights
101, by the tensor cores' rate. 1.6 would be 133 for all, with three gaps and what waits for loads.

| linears | column | token | no outliers | a perfect product |
|---|---|---|---|---|
"""
MEASURED = """\
# LLM.int8() on a GPU: measured on {device}

Written by `python benchmarks/gpu.py` with torch {torch}. A norm and the linears that read it, at
Llama-3-8B's shapes; median microseconds of a call.

| linears | tokens | {contenders} |
|---|---|{rules}|
"""


def modelled_report() -> str:
    """What is printed where there is no GPU."""
    import gpu_model

    text = MODELLED.format(outliers=OUTLIERS) + "\n".join(modelled()) + "\n"
    gpu = gpu_model.GPUS[0]
    few = (f"| {M} {row}" for M in (128, 512) for row in launches(gpu, M))
    text += FEW.format(gpu=gpu.name, launches="\n".join(few))
    M = TOKENS[-1]
    text += FLOORS.format(tokens=M, gpu=gpu.name, launches="\n".join(launches(gpu, M)))
    return text + "\n".join(floors(gpu, M)) + "\n"


def modelled() -> Iterator[str]:
    """Rows of the modelled table."""
    import gpu_model

    for gpu in gpu_model.GPUS:
        for name, widths, K in LAYERS:
            for M in TOKENS:
                fp16 = _fp16(gpu, M, widths, K)
                column, token = (_fastest(gpu, M, widths, K, way) for way in ("column", "token"))
                yield (
                    f"| {gpu.name} | {name} | {M} | {1e6 * fp16:.1f} "
                    f"| {1e6 * column.seconds:.1f} | {fp16 / column.seconds:.2f} "
                    f"| {1e6 * token.seconds:.1f} | {fp16 / token.seconds:.2f} "
                    f"| {column.label} | {column.limit} |"
                )


def launches(gpu: Any, M: int) -> Iterator[str]:
    """Rows of the second modelled table."""
    for name, widths, K in LAYERS:
        for way in ("column", "token"):
            times = *_around(gpu, M, widths, K, way), _product(gpu, M, sum(widths), K)[0]
            cells = " | ".join(f"{1e6 * time.seconds:.1f}, {time.limit}" for time in times)
            yield f"| {name} | {way} | {cells} |"


def floors(gpu: Any, M: int) -> Iterator[str]:
    """Rows of the third modelled table."""
    import gpu_model

    for name, widths, K in LAYERS:
        N = sum(widths)
        product, _ = _product(gpu, M, N, K)
        times = (
            _fastest(gpu, M, widths, K, "column").seconds,
            _fastest(gpu, M, widths, K, "token").seconds,
            _norm(gpu, M, K, "none").seconds + product.seconds,
            sum(time.seconds for time in _around(gpu, M, widths, K, "column"))
            + gpu_model.matmul_int8(gpu, M, N, K),
        )
        fp16 = _fp16(gpu, M, widths, K)
        yield f"| {name} | " + " | ".join(f"{fp16 / time:.2f}" for time in times) + " |"


@functools.cache
def norm_kernels() -> dict[str, Any]:
    """``int8fx/testing/gpuless/norm_kernels.py``'s table, from a process of its own."""
    import gpu_model

    names = (gpu.arch for gpu in gpu_model.GPUS if gpu.arch.startswith("sm_"))
    architectures = list(dict.fromkeys(names))  # the first GPU's is the first
    command = [sys.executable, "-m", "int8fx.testing.gpuless.norm_kernels", *architectures]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    table = json.loads(done.stdout)
    return {
        arch: {kind: {int(K): issued for K, issued in row.items()} for kind, row in kinds.items()}
        for arch, kinds in table.items()
    }


def _norm(gpu: Any, M: int, K: int, kind: str) -> Any:
    import gpu_model

    from int8fx.testing.gpuless import specimens

    issued = (0, 0)
    if kind in ("column", "token"):
        ours = specimens.norm(gpu.arch, K, "fp16", _NORM, quantizes=kind == "token", adds=False)
        if ours.inspection.loops:
            issued = gpu_model.instructions(ours.inspection), ours.num_warps
    elif gpu.arch.startswith("sm_"):
        issued = norm_kernels()[gpu.arch][kind][K]
    return gpu_model.norm(gpu, M, K, kind, *issued)


def _around(gpu: Any, M: int, widths: Sequence[int], K: int, decomposition: str) -> tuple[Any, Any]:
    """The launches before a product: the norm's, and what gathers."""
    import gpu_model
    import torch

    from int8fx.kernels.gpu.gather import launch_shape
    from int8fx.testing.gpuless import specimens

    N = sum(widths)
    gathers, quantizes = (
        specimens.quantize_gather(
            gpu.arch, M, K, "fp16", also, N, _NORM, decomposition == "column"
        ).inspection
        for also in (False, True)
    )
    gather = gpu_model.quantize_gather(
        gpu,
        gathers,
        quantizes if decomposition == "column" else None,
        launch_shape(M, K, N, torch.float16, _NORM, decomposition == "column"),
        M,
        widths,
        K,
        OUTLIERS,
    )
    return _norm(gpu, M, K, decomposition), gather


def _fp16(gpu: Any, M: int, widths: Sequence[int], K: int) -> float:
    """Seconds of a norm and cuBLAS."""
    import gpu_model

    products = sum(gpu_model.matmul_fp16(gpu, M, N, K) for N in widths)
    return _norm(gpu, M, K, "fp16").seconds + products


@dataclass(frozen=True)
class Fastest:
    """All launches with the best row of the table, which row that is, and what limits it."""

    seconds: float
    label: str
    limit: str


def _fastest(gpu: Any, M: int, widths: Sequence[int], K: int, decomposition: str) -> Fastest:
    N = sum(widths)
    if M <= 16:
        before, (product, label) = _decode(gpu, M, N, K, decomposition)
    else:
        before = sum(time.seconds for time in _around(gpu, M, widths, K, decomposition))
        product, label = _product(gpu, M, N, K)
    return Fastest(before + product.seconds, label, product.limit)


def _product(gpu: Any, M: int, N: int, K: int) -> tuple[Any, str]:
    import gpu_model
    import torch

    from int8fx.kernels.gpu import configs
    from int8fx.testing.gpuless import specimens

    times = []
    for config in configs.gemm_configs(gpu.arch, M, N, K, torch.float16, gpu.processors):
        seen = specimens.gemm(gpu.arch, config).inspection
        time = gpu_model.product(gpu, config, seen, M, N, K, OUTLIERS)
        times.append((time, _label(config.block_m + config.extra_m, config.block_n, config.parts)))
    return min(times, key=lambda pair: pair[0].seconds)


def _label(block_m: int, block_n: int, parts: int) -> str:
    return f"{block_m}x{block_n}" + f", split {parts}" * (parts > 1)


def _decode(gpu: Any, M: int, N: int, K: int, decomposition: str) -> tuple[float, tuple[Any, str]]:
    """Seconds of the norm; the product, and its label."""
    import gpu_model

    from int8fx.kernels.gpu import configs, decode, digits
    from int8fx.testing.gpuless import specimens

    quantizes = M > 1 and decomposition == "column"
    # Rows that quantise alone come with three more, their outliers' digits.
    rows = 16 if quantizes else decode.tile_rows(M, digits.DIGITS)
    kind, outliers = ("quantises", OUTLIERS) if quantizes else (f"rows {rows}", 0)
    times = []
    for config in configs.decode_configs(gpu.arch, kind, N, K, gpu.processors):
        parts = configs.split_k(kind, config, N, K, gpu.processors)
        seen = specimens.decode(gpu.arch, kind, config, columns=K // parts).inspection
        time = gpu_model.decode(gpu, config, seen, M, N, K, parts, rows, outliers)
        times.append((time, _label(rows, config.block_n, parts)))
    before = _norm(gpu, M, K, "fp16" if quantizes else "digits").seconds
    return before, min(times, key=lambda pair: pair[0].seconds)


# --- with a GPU -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What is measured, and where.

    Attributes:
        clock: median milliseconds of a call.
    """

    device: str
    layers: tuple[tuple[str, tuple[int, ...], int], ...]
    tokens: tuple[int, ...]
    clock: Callable[[Callable[[], Any]], float]

    def measured(self) -> Iterator[tuple[str, int, dict[str, float]]]:
        """Microseconds by contender, for each group of linears and number of tokens."""
        import torch

        for name, widths, K in self.layers:
            model = _block(widths, K).to(self.device, torch.float16).requires_grad_(False).eval()
            for M in self.tokens:
                torch.compiler.reset()  # or the recompiles of one forward() come to their limit
                contenders = _contenders(model)
                x = torch.randn(M, K, dtype=torch.float16, device=self.device)
                x[:, torch.randperm(K, device=self.device)[:OUTLIERS]] *= 20
                times = {who: self._microseconds(call, x) for who, call in contenders.items()}
                yield name, M, times

    def _microseconds(self, call: Callable[..., Any], x: Any) -> float:
        import torch

        with torch.no_grad():
            return 1e3 * self.clock(lambda: call(x))

    def table(self, device: str) -> str:
        import torch

        results = list(self.measured())
        contenders = list(results[0][2])
        text = MEASURED.format(
            device=device,
            torch=torch.__version__,
            contenders=" | ".join(contenders),
            rules="|".join(["---"] * len(contenders)),
        )
        for name, M, times in results:
            cells = " | ".join(f"{times[who]:.1f}" for who in contenders)
            text += f"| {name} | {M} | {cells} |\n"
        return text


def _bench(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=100, rep=300, return_mode="median")


def _once(call: Callable[[], Any]) -> float:
    call()
    return math.nan


ON_A_GPU = Bench("cuda", LAYERS, TOKENS, _bench)
# Every line of the above on a CPU: nothing is timed.
REHEARSAL = Bench("cpu", (("two", (96, 64), 64),), (1, 20), _once)


def _block(widths: tuple[int, ...], K: int) -> Any:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(K)
            self.linears = nn.ModuleList(nn.Linear(K, N, bias=False) for N in widths)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            h = self.norm(x)
            return [linear(h) for linear in self.linears]

    return Block()


def _contenders(model: Any) -> dict[str, Callable[..., Any]]:
    import torch

    contenders = {
        "fp16": torch.compile(model, mode="max-autotune", dynamic=False),
        "int8fx": torch.compile(model, backend="llmint8", dynamic=False),
        "int8fx, tuned": torch.compile(model, backend="llmint8", mode="max-autotune", dynamic=False),
    }
    for name, convert in (("bitsandbytes", _bitsandbytes), ("torchao", _torchao)):
        try:
            contenders[name] = convert(copy.deepcopy(model))
        except ImportError:
            print(f"{name} is not installed, and not compared")
    return contenders


def _bitsandbytes(model: Any) -> Any:
    import bitsandbytes

    device = model.norm.weight.device
    for index, linear in enumerate(model.linears):
        quantized = bitsandbytes.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
        )
        quantized.load_state_dict(linear.state_dict())
        model.linears[index] = quantized.to(device).eval()
    return model


def _torchao(model: Any) -> Any:
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model, mode="max-autotune", dynamic=False)


def main(arguments: Sequence[str] | None = None) -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rehearse", action="store_true", help="run what measures, once, on the CPU; writes nothing"
    )
    if parser.parse_args(arguments).rehearse:
        print(REHEARSAL.table("nothing: a rehearsal on a CPU"))
        return
    if torch.cuda.is_available():
        text = ON_A_GPU.table(torch.cuda.get_device_name())
    else:
        text = modelled_report()
    print(text)
    TABLE.write_text(text)


if __name__ == "__main__":
    main()
