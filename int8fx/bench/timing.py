"""Timing several callables against each other in one process: interleaved, medians with spread; and
what every benchmark says of the machine.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    def __truediv__(self, parts: int) -> "Timing":
        return Timing(self.median / parts, self.low / parts, self.high / parts)

    @property
    def spread(self) -> float:
        return (self.high - self.low) / self.median


def interleaved(
    contenders: Mapping[str, Sequence[Callable[[], object]]],
    *,
    seconds: float = 1.0,
    least: int = 7,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Times each contender's calls in turn: one of the first, one of the second, ... and again.

    Args:
        contenders: several calls each, taken round-robin: with as many copies of a weight as do not
            fit into the cache, every call meets cold memory.
        seconds: of measuring, for each contender.
        least: rounds at the least.
    """
    for calls in contenders.values():
        for call in calls:
            for _ in range(warmup):
                call()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    started, done = time.perf_counter(), 0
    while done < least or time.perf_counter() - started < seconds * len(contenders):
        for name, calls in contenders.items():
            call = calls[done % len(calls)]
            before = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - before)
        done += 1
    return {name: timing_of(values) for name, values in samples.items()}


def timing_of(values: Sequence[float]) -> Timing:
    """The median and quartiles of at least two samples."""
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)


def machine() -> str:
    """The processor, what it can do, the threads, and torch's release."""
    capability = torch.backends.cpu.get_cpu_capability()
    amx = torch.cpu.get_capabilities().get("amx_int8", False)
    return (
        f"{processor()}, {threads()}, {capability}{' with AMX' if amx else ''}, "
        f"torch {torch.__version__}"
    )


def threads() -> str:
    count = torch.get_num_threads()
    return "1 thread" if count == 1 else f"{count} threads"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
