"""LLM.int8() on a GPU, modelled: writes benchmarks/gpu.md, with what a GPU has to show.

    python benchmarks/gpu_modelled.py

The unit is a norm and the linears that read it, at the shapes of Llama-3-8B. ``gpu_model.py`` has the
formulas, ``gpu.py`` measures.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_model
import torch
from gpu_day import acceptance
from gpu_day.shapes import LAYERS, OUTLIERS, WAYS, Layer

from int8fx.kernels.gpu import configs, decode, residues
from int8fx.kernels.gpu.gather import launch_shape
from int8fx.testing.gpuless import specimens

PAGE = Path(__file__).with_name("gpu.md")
TOKENS = (1, 16, 128, 512, 4096)
_NORM = "rms"

MODELLED = """\
# LLM.int8() on a GPU: a model, not a measurement

{acceptance}
## The model

Written by `python benchmarks/gpu_modelled.py` on a machine without a GPU, from the compiled kernels and
data sheets (`benchmarks/gpu_model.py` has the formula and every constant). A norm and the linears that
read it, at Llama-3-8B's shapes, with {outliers} outlier columns in which every row has an outlier;
microseconds inside a CUDA graph, of the column and of the token decomposition, and how many times
as fast as *fp16*: a norm, and cuBLAS without any tile effect. It ranks configurations; do not quote it
as speed.

*Limited by* names what most of the time of the column decomposition's product goes into. L2: a tile of
128 x 256 reads 384 bytes for every 32,768 products, and Triton 3.9 has no multicast to share them
between processors: with `num_ctas=2` and 256 x 256 for two of them, by pointers as by TMA descriptors,
there is none in the PTX, and each keeps the whole of one operand in its shared memory. *192x256* is a
mix of such tiles and of 128 x 256 (`kernels/gpu/mixed_tiles.py`): 448 bytes for every 49,152.
*Quantising* is what each program of the decode kernel does for itself at 2 to 16 tokens. Loads that
wait for one another are counted in full on top of everything else: in what gathers (the candidate row
of a column, its element, the list, what it lists), and at the end of a product that is split. The
instructions of a norm are those of our kernel (`kernels/gpu/norm.py`), compiled for each GPU. Of fp16,
of up to 16 tokens, and without outliers they are those of the code that Inductor generates for an H100
(`int8fx/testing/gpuless/norm_kernels.py`). AMD's are not modelled.

Not in the model, either: Triton leaves no int8 product in flight on an H100. It waits once in a step
of 128 rows, and twice in one of 192, which is 1.5 times as much work. By an estimate, 70 to 100 cycles
for each wait, beyond the share of the tensor cores' rate that all products get, would undo what tiles
of 192 rows gain for q/k/v and o. `mode="max-autotune"` tries both.

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


def report() -> str:
    """The whole page."""
    modelled = [Modelled(gpu) for gpu in gpu_model.GPUS]
    rows = "\n".join(row for each in modelled for row in each.rows())
    text = MODELLED.format(outliers=OUTLIERS, acceptance=acceptance.page()) + rows + "\n"
    first, M = modelled[0], TOKENS[-1]
    few = (f"| {M} {row}" for M in (128, 512) for row in first.launches(M))
    text += FEW.format(gpu=first.gpu.name, launches="\n".join(few))
    text += FLOORS.format(tokens=M, gpu=first.gpu.name, launches="\n".join(first.launches(M)))
    return text + "\n".join(first.floors(M)) + "\n"


Product = Callable[[Any, int, int, int], tuple[gpu_model.Time, str]]
# Of a warp, for a row, and how many warps; by architecture, kind of norm and K.
NormKernels = dict[str, dict[str, dict[int, tuple[int, int]]]]


@functools.cache
def norm_kernels() -> NormKernels:
    """``int8fx/testing/gpuless/norm_kernels.py``'s table, from a process of its own."""
    names = (gpu.arch for gpu in gpu_model.GPUS if gpu.arch.startswith("sm_"))
    architectures = list(dict.fromkeys(names))  # the first GPU's is the first
    command = [sys.executable, "-m", "int8fx.testing.gpuless.norm_kernels", *architectures]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    table = json.loads(done.stdout)
    return {
        arch: {kind: {int(K): issued for K, issued in row.items()} for kind, row in kinds.items()}
        for arch, kinds in table.items()
    }


def fastest_product(gpu: Any, M: int, N: int, K: int) -> tuple[gpu_model.Time, str]:
    """The best row of the table for 17 rows and more, and its label."""
    times = []
    for config in configs.gemm_configs(gpu.arch, M, N, K, torch.float16, gpu.processors):
        seen = specimens.gemm(gpu.arch, config).inspection
        time = gpu_model.product(gpu, config, seen, M, N, K, OUTLIERS)
        times.append((time, _label(config.block_m + config.extra_m, config.block_n, config.parts)))
    return min(times, key=lambda pair: pair[0].seconds)


def _label(block_m: int, block_n: int, parts: int) -> str:
    return f"{block_m}x{block_n}" + f", split {parts}" * (parts > 1)


@dataclass(frozen=True)
class Fastest:
    """All launches with the best row of the table, which row that is, and what limits it."""

    seconds: float
    label: str
    limit: str


@dataclass(frozen=True)
class Modelled:
    """A norm and the linears that read it, on one GPU.

    Attributes:
        product: the time of a product, and a label.
        norms: what Inductor's norms issue.
    """

    gpu: Any
    product: Product = fastest_product
    norms: Callable[[], NormKernels] = norm_kernels

    def rows(self) -> Iterator[str]:
        """Of the first table."""
        for layer in LAYERS:
            for M in TOKENS:
                fp16 = self.fp16(M, layer)
                column, token = (self.fastest(M, layer, way) for way in WAYS)
                yield (
                    f"| {self.gpu.name} | {layer.name} | {M} | {1e6 * fp16:.1f} "
                    f"| {1e6 * column.seconds:.1f} | {fp16 / column.seconds:.2f} "
                    f"| {1e6 * token.seconds:.1f} | {fp16 / token.seconds:.2f} "
                    f"| {column.label} | {column.limit} |"
                )

    def launches(self, M: int) -> Iterator[str]:
        """Of the tables of where the time goes."""
        for layer in LAYERS:
            for way in WAYS:
                product, _ = self.product(self.gpu, M, layer.N, layer.K)
                times = *self.around(M, layer, way), product
                cells = " | ".join(f"{1e6 * time.seconds:.1f}, {time.limit}" for time in times)
                yield f"| {layer.name} | {way} | {cells} |"

    def floors(self, M: int) -> Iterator[str]:
        """Of the last table."""
        for layer in LAYERS:
            product, _ = self.product(self.gpu, M, layer.N, layer.K)
            before = sum(time.seconds for time in self.around(M, layer, "column"))
            times = (
                self.fastest(M, layer, "column").seconds,
                self.fastest(M, layer, "token").seconds,
                self.norm(M, layer.K, "none").seconds + product.seconds,
                before + gpu_model.matmul_int8(self.gpu, M, layer.N, layer.K),
            )
            fp16 = self.fp16(M, layer)
            yield f"| {layer.name} | " + " | ".join(f"{fp16 / time:.2f}" for time in times) + " |"

    def norm(self, M: int, K: int, kind: str) -> gpu_model.Time:
        """Of a kind of ``gpu_model.MOVES``: ours before a product, else Inductor's."""
        gpu, issued = self.gpu, (0, 0)
        if kind in WAYS:
            ours = specimens.norm(gpu.arch, K, "fp16", _NORM, quantizes=kind == "token", adds=False)
            if ours.inspection.loops:
                issued = gpu_model.instructions(ours.inspection), ours.num_warps
        elif gpu.arch.startswith("sm_"):
            issued = self.norms()[gpu.arch][kind][K]
        return gpu_model.norm(gpu, M, K, kind, *issued)

    def around(self, M: int, layer: Layer, way: str) -> tuple[gpu_model.Time, gpu_model.Time]:
        """The launches before a product: the norm's, and what gathers."""
        N, K, quantizes = layer.N, layer.K, way == "column"
        seen = {
            also: specimens.quantize_gather(
                self.gpu.arch, M, K, "fp16", also, N, _NORM, quantizes
            ).inspection
            for also in {False, quantizes}
        }
        shape = launch_shape(M, K, N, torch.float16, _NORM, quantizes)
        both = seen[True] if quantizes else None
        gather = gpu_model.quantize_gather(
            self.gpu, seen[False], both, shape, M, layer.widths, K, OUTLIERS
        )
        return self.norm(M, K, way), gather

    def fp16(self, M: int, layer: Layer) -> float:
        """Seconds of a norm and cuBLAS."""
        products = sum(gpu_model.matmul_fp16(self.gpu, M, N, layer.K) for N in layer.widths)
        return self.norm(M, layer.K, "fp16").seconds + products

    def fastest(self, M: int, layer: Layer, way: str) -> Fastest:
        if M <= decode.MAX_M:
            before, (product, label) = self.decode(M, layer, way)
        else:
            before = sum(time.seconds for time in self.around(M, layer, way))
            product, label = self.product(self.gpu, M, layer.N, layer.K)
        return Fastest(before + product.seconds, label, product.limit)

    def decode(self, M: int, layer: Layer, way: str) -> tuple[float, tuple[gpu_model.Time, str]]:
        """Seconds of the norm; the product, and its label."""
        gpu, N, K = self.gpu, layer.N, layer.K
        quantizes = M > 1 and way == "column"
        # Rows that quantise alone come with three more, their outliers' residues.
        rows = 16 if quantizes else decode.tile_rows(M, residues.RESIDUES)
        kind, outliers = ("quantises", OUTLIERS) if quantizes else (f"rows {rows}", 0)
        times = []
        for config in configs.decode_configs(gpu.arch, kind, N, K, gpu.processors):
            parts = configs.split_k(kind, config, N, K, gpu.processors)
            seen = specimens.decode(gpu.arch, kind, config, columns=K // parts).inspection
            time = gpu_model.decode(gpu, config, seen, M, N, K, parts, rows, outliers)
            times.append((time, _label(rows, config.block_n, parts)))
        before = self.norm(M, K, "fp16" if quantizes else "residues").seconds
        return before, min(times, key=lambda pair: pair[0].seconds)


def main() -> None:
    text = report()
    print(text)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
