"""LLM.int8() on a GPU: measured where there is one, modelled where there is none.

    python benchmarks/gpu.py            # writes benchmarks/gpu.md: headed as a model, or as measured
    python benchmarks/gpu.py --rehearse # runs the measuring half once, on the CPU

The unit is a norm and the linears that read it, at the shapes of Llama-3-8B. Measured is against the
same module in fp16 under torch.compile, and against bitsandbytes and torchao when they are installed.
No machine with a GPU was there to write it on: the measuring half has run in rehearsal alone.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / "gpuless"), str(Path(__file__).parent)]
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

MODELLED = """\
# LLM.int8() on a GPU: a model, not a measurement

Written by `python benchmarks/gpu.py` on a machine without a GPU, from the compiled kernels and data
sheets (`benchmarks/gpu_model.py` has the formula and every constant). A norm and the linears that read
it, at Llama-3-8B's shapes, with {outliers} outlier columns; microseconds inside a CUDA graph. *fp16*
is a norm and cuBLAS without any tile effect. It ranks configurations; do not quote it as speed.

*Limited by* names what most of the time goes into. L2: a tile of 128 x 256 reads 384 bytes for every
32,768 products, and Triton 3.9 has no multicast to share them between processors: with `num_ctas=2`
and 256 x 256 for two of them, by pointers as by TMA descriptors, there is none in the PTX, and each
keeps the whole of one operand in its shared memory. Beside the product, a norm, its quantisation and
the gathering of outliers move 7 bytes an element of the activation, where fp16 moves 4; the last table
has what that costs.
*Quantising* is what each program of the decode kernel does for itself at 2 to 16 tokens.

| GPU | linears | tokens | fp16 | int8fx | ratio | configuration | limited by |
|---|---|---|---|---|---|---|---|
"""
FLOORS = """
## What no product can mend

Over fp16 at {tokens} tokens on {gpu}: the table's ratio, what it would be with a product as fast as the
tensor cores are (no tile effects, no L2), and with that and a norm computed twice instead of written
(5 bytes an element: the quantising kernel would read the norm's input and its scale of each row).

| linears | int8fx | a perfect product | and the norm not written |
|---|---|---|---|
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
    text += FLOORS.format(tokens=TOKENS[-1], gpu=gpu_model.GPUS[0].name)
    return text + "\n".join(floors()) + "\n"


def modelled() -> Iterator[str]:
    """Rows of the modelled table."""
    import gpu_model

    for gpu in gpu_model.GPUS:
        for name, widths, K in LAYERS:
            for M in TOKENS:
                fp16 = _fp16(gpu, M, widths, K)
                seconds, label, limit = _fastest(gpu, M, sum(widths), K)
                yield (
                    f"| {gpu.name} | {name} | {M} | {1e6 * fp16:.1f} | {1e6 * seconds:.1f} "
                    f"| {fp16 / seconds:.2f} | {label} | {limit} |"
                )


def floors() -> Iterator[str]:
    """Rows of the second modelled table: the first GPU at the most tokens."""
    import gpu_model

    gpu, M = gpu_model.GPUS[0], TOKENS[-1]
    for name, widths, K in LAYERS:
        N = sum(widths)
        fp16 = _fp16(gpu, M, widths, K)
        around = gpu_model.norm(gpu, M, K) + gpu_model.quantize_gather(gpu, M, N, K, OUTLIERS)
        perfect = around + gpu_model.matmul_int8(gpu, M, N, K)
        fused = perfect - 2 * gpu_model.streaming(gpu, M * K) + 2 * gpu.gap
        seconds, _, _ = _fastest(gpu, M, N, K)
        ratios = (fp16 / time for time in (seconds, perfect, fused))
        yield f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |"


def _fp16(gpu: Any, M: int, widths: Sequence[int], K: int) -> float:
    """Seconds of a norm and cuBLAS."""
    import gpu_model

    return gpu_model.norm(gpu, M, K) + sum(gpu_model.matmul_fp16(gpu, M, N, K) for N in widths)


def _fastest(gpu: Any, M: int, N: int, K: int) -> tuple[float, str, str]:
    """Our launches with the best row of the table: seconds, the row, what limits it."""
    import gpu_model
    import specimens
    import torch

    from int8fx.kernels.gpu import configs

    before = gpu_model.norm(gpu, M, K)
    times = []
    if M <= 16:
        # The default decomposition, by columns: one row quantises alone, its outliers three more rows.
        kind, rows, outliers = ("rows 16", 16, 0) if M == 1 else ("quantises", 16, OUTLIERS)
        for config in configs.decode_configs(gpu.arch, kind, N, K, gpu.processors):
            parts = configs.split_k(kind, config, N, K, gpu.processors)
            seen = specimens.decode(gpu.arch, kind, config, columns=K // parts).inspection
            time = gpu_model.decode(gpu, config, seen, M, N, K, parts, rows, outliers)
            label = f"{rows}x{config.block_n}" + f", split {parts}" * (parts > 1)
            times.append((before + time.seconds, label, time.limit))
        return min(times)
    before += gpu_model.quantize_gather(gpu, M, N, K, OUTLIERS)
    for config in configs.gemm_configs(gpu.arch, M, N, torch.float16):
        seen = specimens.gemm(gpu.arch, config).inspection
        time = gpu_model.product(gpu, config, seen, M, N, K, OUTLIERS)
        times.append((before + time.seconds, f"{config.block_m}x{config.block_n}", time.limit))
    return min(times)


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
