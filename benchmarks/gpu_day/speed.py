"""How fast? A norm and linears over cuBLAS, each tile of the table, and decode.

Every contender runs inside a CUDA graph, with L2 cleared before each replay.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gpu_day import contenders, decoder, tables
from gpu_day.process import Run, in_shards
from gpu_day.rehearsal import gpu_operators
from gpu_day.shapes import EPS, THRESHOLD, WAYS, Layer, activation, operands

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Job:
    """One line: what it is of, and who is measured.

    Attributes:
        calls: makes the operands, when its turn comes.
        captured: whether the calls can be part of a CUDA graph.
    """

    labels: dict[str, Any]
    calls: Callable[[], Calls]
    captured: bool = True


def compile_everything(run: Run) -> None:
    """Fills the caches of the steps after this one, in many processes: nothing is timed."""
    if run.shard == (0, 1):
        sys.exit(not in_shards(run, run.place.processes))
    run.place.torch()
    gpu_operators()
    count = 0
    for number, job in run.share(_all_jobs(run)):
        run.say(begins=number, **job.labels)
        calls = list(job.calls().items())
        first = run.shard[0] % len(calls)  # others begin with another, and find this one compiled
        count += sum(_compiled(run, job, *each) for each in (*calls[first:], *calls[:first]))
        run.place.synchronize()
    run.say(shard=run.shard[0], calls=count)


def _compiled(run: Run, job: Job, name: str, call: Callable[[], Any]) -> bool:
    try:
        with run.place.torch().no_grad():
            call()
    except Exception as error:  # which is told again where it is timed
        run.say(**job.labels, call=name, error=_short(error))
        return False
    return True


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _all_jobs(run: Run) -> Iterator[Job]:
    """What takes longest to compile comes first."""
    who = decoder.WHO[1:2] if run.rehearses else decoder.WHO
    decoders = (Job({"who": each}, functools.partial(decoder.calls, run, each)) for each in who)
    return itertools.chain(decoders, linear_jobs(run), tile_jobs(run), decode_jobs(run))


def linears(run: Run) -> None:
    """A norm and the linears that read it, of 17 rows and more."""
    _measure(run, linear_jobs(run))


def tiles(run: Run) -> None:
    """The product, with what gathers before it, in each tile that might be the table's."""
    _measure(run, tile_jobs(run))


def decodes(run: Run) -> None:
    """A norm and linears of few rows: compiled, and the decode kernel in each of its tiles."""
    _measure(run, decode_jobs(run))


def _measure(run: Run, jobs: Iterator[Job]) -> None:
    run.place.torch()
    gpu_operators()
    for job in jobs:
        us, errors = {}, {}
        for who, call in job.calls().items():
            try:
                timed = run.place.replayed(call) if job.captured else call
                us[who] = run.place.microseconds(timed)
            except Exception as error:
                errors[who] = _short(error)
        run.say(**job.labels, us=us, **({"errors": errors} if errors else {}))


def linear_jobs(run: Run) -> Iterator[Job]:
    for layer, M in itertools.product(run.place.layers, run.place.tokens):
        labels = {"layer": layer.name, "M": M}
        yield Job(labels, functools.partial(_linear_calls, run, layer, M))
        for name in contenders.OPTIONAL:
            if contenders.missing(name) is None:
                calls = functools.partial(contenders.optional_calls, run, name, layer, M)
                yield Job(labels | {"optional": name}, calls, captured=False)


def _linear_calls(run: Run, layer: Layer, M: int) -> Calls:
    torch = run.place.torch()
    calls: Calls = {}
    for name, x, weight, w, s in _operands(run, layer, M):
        calls |= _cublas(torch, name, x, weight, w, s)
        for way in WAYS if name == "fp16" else WAYS[:1]:
            calls[f"{way} {name}"] = _normed(torch, x, weight, way, w, s)
    joined, x_int8 = torch.cat(w), torch.randint(-127, 128, (M, layer.K), dtype=torch.int8)
    return calls | {"int_mm alone": lambda: torch._int_mm(x_int8, joined.t())}


def _operands(run: Run, layer: Layer, M: int) -> Iterator[tuple[str, Any, Any, list[Any], list[Any]]]:
    """In each 16-bit dtype: its name, an activation, a norm's weight, int8 weights and their scales."""
    torch = run.place.torch()
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        w, s, _ = operands(torch, layer.widths, layer.K, dtype)
        yield name, activation(torch, M, layer.K, dtype), torch.ones(layer.K, dtype=dtype), w, s


def _cublas(torch: Any, name: str, x: Any, weight: Any, w: list[Any], s: list[Any]) -> Calls:
    """A norm and products in 16-bit, each for itself, and all in one."""
    K = x.shape[1]
    each = [(one * scale.unsqueeze(1)).to(x.dtype) for one, scale in zip(w, s, strict=True)]
    joined = torch.cat(each)
    norm = torch.nn.functional.rms_norm
    return {
        name: lambda: [norm(x, (K,), weight, EPS) @ one.t() for one in each],
        f"{name} joined": lambda: norm(x, (K,), weight, EPS) @ joined.t(),
    }


def _normed(torch: Any, x: Any, weight: Any, way: str, w: list[Any], s: list[Any]) -> Callable[[], Any]:
    run = torch.ops.int8fx.normed_linears_gpu
    return lambda: run(x, None, "rms", weight, None, EPS, THRESHOLD, way, w, s, [])


def tile_jobs(run: Run) -> Iterator[Job]:
    for layer, M in itertools.product(run.place.layers, run.place.tile_classes):
        labels = {"layer": layer.name, "M": M, "N": layer.N, "K": layer.K}
        yield Job(labels, functools.partial(_tile_calls, run, layer, M))


# Beside the table's own: two blocks a processor, and what else a step of K may be.
def more_tiles(arch: str) -> tuple[Any, ...]:
    from int8fx.kernels.gpu.configs import GemmConfig as Tile

    if arch not in ("sm_90", "sm_100"):
        return ()
    return (
        Tile(128, 128, 128, 4, 3),
        Tile(128, 128, 64, 4, 4),
        Tile(128, 128, 64, 8, 5),
        Tile(64, 256, 128, 4, 3),
        Tile(64, 256, 128, 4, 2),
        Tile(128, 256, 64, 8, 4),
        Tile(64, 128, 256, 4, 3),
    )


def _more(run: Run) -> Callable[[str], tuple[Any, ...]]:
    return lambda arch: more_tiles(arch)[: 1 if run.rehearses else None]


def _tile_calls(run: Run, layer: Layer, M: int) -> Calls:
    """By the JSON of a tile; ``"alone"`` is the built-in guess with nothing gathered before it."""
    from int8fx.kernels.gpu import linear

    torch, half = run.place.torch(), run.place.torch().float16
    weights, scales, _ = operands(torch, layer.widths, layer.K, half)
    given = linear.Linears(weights, scales, [])
    source = linear.Source(
        activation(torch, M, layer.K, half),
        half,
        torch.zeros(2, layer.K, dtype=torch.int16),  # of row 0, which is no outlier but in some columns
        torch.randint(-127, 128, (M, layer.K), dtype=torch.int8),
        torch.rand(M),
        True,
    )

    def product(threshold: float) -> list[Any]:
        return linear.product(source, threshold, given)

    calls = {
        tables.label(tile): tables.forced(
            lambda: product(THRESHOLD), tables.of_product(run.place.device, tile, M, layer.N, layer.K)
        )
        for tile in tables.product_candidates(run.place.device, M, layer.N, layer.K, _more(run))
    }
    return calls | {"alone": lambda: product(0.0)}


def decode_jobs(run: Run) -> Iterator[Job]:
    for layer, M in itertools.product(run.place.layers, run.place.decode_tokens):
        labels = {"layer": layer.name, "M": M, "N": layer.N, "K": layer.K}
        yield Job(labels, functools.partial(_decode_calls, run, layer, M))
        for way in WAYS if M > 1 else WAYS[:1]:
            kind = tables.kind_of_decode(M, way)
            calls = functools.partial(_decode_tile_calls, run, layer, M, way)
            yield Job(labels | {"way": way, "kind": kind}, calls)


def _decode_calls(run: Run, layer: Layer, M: int) -> Calls:
    """As a decoder runs them: ours compiled with the norm before them."""
    torch = run.place.torch()
    calls: Calls = {}
    for name, *given in _operands(run, layer, M):
        calls |= _cublas(torch, name, *given)
    return calls | {"column fp16": contenders.compiled(run, layer, M, "column")}


def _decode_tile_calls(run: Run, layer: Layer, M: int, way: str) -> Calls:
    torch, half = run.place.torch(), run.place.torch().float16
    weights, scales, _ = operands(torch, layer.widths, layer.K, half)
    x, kind = activation(torch, M, layer.K, half), tables.kind_of_decode(M, way)

    def linears() -> list[Any]:
        return torch.ops.int8fx.int8_linears_gpu(x, THRESHOLD, way, weights, scales, [])

    return {
        tables.label(tile): tables.forced(
            linears, tables.of_decode(run.place.device, tile, kind, layer.N, layer.K)
        )
        for tile in tables.decode_candidates(run.place.device, kind, layer.N, layer.K)
    }
