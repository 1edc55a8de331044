"""What a compiled kernel is made of: registers, spills, shared memory, instructions.

NVIDIA: from the cubin, with the ``nvdisasm`` and ``cuobjdump`` that Triton's wheel carries.
AMD: from the assembly that Triton keeps, and the metadata in it.
"""

import collections
import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_PREDICATE = r"(?:@!?U?P\w+\s+)?"
_OPCODE = re.compile(
    rf"^\s+(?:/\*[0-9a-f]+\*/\s+)?{_PREDICATE}([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", re.MULTILINE
)
# Matrix instructions on int8, by what each architecture calls them.
_INT8_MMA = re.compile(r"IG?MMA|v_mfma_i32|v_smfmac_i32")

# Registers and shared memory (bytes) of a multiprocessor, and how many threads it holds.
_MULTIPROCESSOR = {
    80: (65536, 164 << 10, 2048),
    86: (65536, 100 << 10, 1536),
    89: (65536, 100 << 10, 1536),
    90: (65536, 228 << 10, 2048),
    100: (65536, 228 << 10, 2048),
    120: (65536, 100 << 10, 1536),
}
# A compute unit: registers of a lane in one SIMD, LDS bytes, SIMDs, waves of a SIMD.
_COMPUTE_UNIT = {"gfx90a": (512, 64 << 10, 4, 8), "gfx942": (512, 64 << 10, 4, 8)}


@dataclass(frozen=True)
class Inspection:
    """A compiled kernel.

    Attributes:
        arch: 80, 90, ... or "gfx942".
        threads: of a block.
        registers: of a thread (AMD: vector and accumulation registers together).
        spill_bytes: of a thread's stack, where any instruction reads or writes it; in a kernel without
            local arrays these are spills. ptxas may reserve a stack, around a call, that none does.
        shared_bytes: of a block.
        mma: matrix instructions, with their numbers of occurrences.
        opcodes: all instructions without their modifiers.
        loops: the same for the body of each loop, innermost loops first.
    """

    arch: int | str
    threads: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    mma: dict[str, int]
    opcodes: dict[str, int]
    loops: list[dict[str, int]]

    @property
    def int8_mma(self) -> list[str]:
        """The int8 matrix instructions in the kernel."""
        return [name for name in self.mma if _INT8_MMA.search(name)]

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks run at once on one multiprocessor, by registers, memory and threads."""
        if isinstance(self.arch, str):
            registers, shared, simds, waves = _COMPUTE_UNIT[self.arch]
            resident = simds * min(waves, registers // max(1, math.ceil(self.registers / 8) * 8))
            by_registers = resident // (self.threads // 64)
            by_threads = simds * waves // (self.threads // 64)
        else:
            registers, shared, threads = _MULTIPROCESSOR[self.arch]
            by_registers = registers // (math.ceil(self.registers / 8) * 8 * self.threads)
            by_threads = threads // self.threads
            shared -= 1024 if self.shared_bytes else 0
        by_shared = shared // self.shared_bytes if self.shared_bytes else by_threads
        return min(by_registers, by_threads, by_shared)


def inspect(compiled: Any) -> Inspection:
    """Looks into a ``triton.compile`` result."""
    target = compiled.metadata.target
    threads = compiled.metadata.num_warps * target.warp_size
    shared = compiled.metadata.shared
    if target.backend == "hip":
        return _amd(target.arch.split(":")[0], compiled.asm["amdgcn"], threads, shared)
    return _nvidia(target.arch, compiled.asm["cubin"], threads, shared)


def _nvidia(arch: int, cubin: bytes, threads: int, shared: int) -> Inspection:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump said {usage!r}")
    registers, stack, _, local = map(int, match.groups())
    names = _OPCODE.findall(listing)
    spills = any(name.split(".")[0] in ("LDL", "STL") for name in names)
    return Inspection(
        arch=arch,
        threads=threads,
        registers=registers,
        spill_bytes=stack + local if spills else 0,
        shared_bytes=shared,
        mma=_count(name for name in names if "MMA" in name.split(".")[0]),
        opcodes=_count(name.split(".")[0] for name in names),
        loops=_sass_loops(listing),
    )


def _run(tool: str, *args: str) -> str:
    done = subprocess.run([_TOOLS / tool, *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool}: {done.stderr}")
    return done.stdout


def _count(names: Any) -> dict[str, int]:
    return dict(collections.Counter(names))


def _sass_loops(listing: str) -> list[dict[str, int]]:
    """The instructions between each backward branch and its label, shortest first."""
    lines = listing.splitlines()
    labels: dict[str, int] = {}
    bodies = []
    for number, line in enumerate(lines):
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = number
        branch = re.search(r"\bBRA(?:\.\w+)*\s+(?:U?!?U?P\w+,\s*)?`\((\.L_x_\d+)\)", line)
        if branch and branch[1] in labels:
            body = "\n".join(lines[labels[branch[1]] : number + 1])
            bodies.append([name.split(".")[0] for name in _OPCODE.findall(body)])
    return [_count(body) for body in sorted(bodies, key=len)]


def _amd(arch: str, assembly: str, threads: int, shared: int) -> Inspection:
    def metadata(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(match[1]) if match else 0

    names = re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", assembly, re.MULTILINE)
    return Inspection(
        arch=arch,
        threads=threads,
        # vgpr_count holds both kinds where they share one file, as they do from gfx90a.
        registers=metadata("vgpr_count"),
        spill_bytes=metadata("private_segment_fixed_size"),
        shared_bytes=shared,
        mma=_count(name for name in names if "mfma" in name or "smfmac" in name),
        opcodes=_count(names),
        loops=[],
    )
