"""What this machine and its torch are, as far as compiled code depends on it; torch is not imported."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterable
from pathlib import Path

from int8fx.errors import ArtefactError

CPU = Path("/proc/cpuinfo")

# Features that a compiler writes instructions for; the rest of what a CPU lists is for its kernel.
INSTRUCTIONS = (
    "sse3 ssse3 sse4_1 sse4_2 sse4a popcnt movbe abm lzcnt bmi1 bmi2 adx f16c fma fma4 xop avx avx2 "
    "aes vaes pclmulqdq vpclmulqdq gfni sha_ni avx_vnni avx_ifma avx_vnni_int8 avx_vnni_int16 "
    "avx_ne_convert avx512f avx512dq avx512cd avx512bw avx512vl avx512ifma avx512vbmi avx512_vbmi2 "
    "avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_vp2intersect avx512_bf16 avx512_fp16 "
    "amx_tile amx_int8 amx_bf16 amx_fp16 "
    "asimd asimdhp asimddp sve sve2 i8mm bf16"
).split()


def instructions() -> list[str]:
    """The instruction sets of this machine's CPU that compilers know."""
    there = _features()
    return [name for name in INSTRUCTIONS if name in there]


def missing(needed: Iterable[str]) -> list[str]:
    """Those of some instruction sets that this machine lacks."""
    there = _features()
    return [name for name in needed if name not in there]


def _features() -> frozenset[str]:
    try:
        lines = CPU.read_text().splitlines()
    except OSError:
        return frozenset()
    listed = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(listed, "").split())


def architecture() -> str:
    return platform.machine()


def torch_version() -> str:
    """Of the torch that is installed here: ``2.13.0``, whatever it was built for.

    Raises:
        ArtefactError: there is none.
    """
    try:
        return importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError as error:
        raise ArtefactError("torch is not installed: its library runs the compiled code") from error


def torch_libraries() -> Path:
    """The folder of torch's libraries.

    Raises:
        ArtefactError: torch is not installed.
    """
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise ArtefactError("torch is not installed: its library runs the compiled code")
    return Path(found.submodule_search_locations[0]) / "lib"
