"""Vector loads and stores whose addresses may be misaligned, read from a kernel's PTX.

A vector access of 2 to 16 bytes ends in CUDA error 716 where its address is no multiple of its size.
Triton makes one only where it can prove, or is told (``tl.multiple_of``, ``tl.max_contiguous``), that
neighbours in a tile are neighbours in memory. A remainder ``n % N`` starts again at N: whoever says it
is contiguous is wrong for an N that the vector does not divide, and ``scale_ptr + n % N`` is then
misaligned. A remainder that is scaled first (``row % M * K``) only chooses a row, whose alignment
follows from K.

AMD's GPUs take vector accesses at any address, so this is about NVIDIA's.
"""

import collections
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(%\w+)\s*,\s*(.*);")
_HALVES = re.compile(r"mov\.b64\s+\{\s*(%\w+)\s*,\s*(%\w+)\s*\}\s*,\s*(%\w+)\s*;")
_ADDRESS = re.compile(r"\[\s*(%\w+)")
_REGISTER = re.compile(r"%\w+")
_PARAMETER = re.compile(r"_param_(\d+)\]")
_LINE = 16  # elements: a multiple of them is as aligned as any access needs


@dataclass(frozen=True)
class Access:
    """A load, store or asynchronous copy of global memory."""

    instruction: str
    address: str
    nbytes: int


def misaligned(ptx: str, itemsizes: Mapping[int, int], aligned: Collection[int] = ()) -> list[str]:
    """The vector accesses whose addresses come from a remainder.

    Args:
        ptx: of one kernel.
        itemsizes: of what a pointer points to, in bytes, by the number of its parameter.
        aligned: the parameters that 16 divides: a remainder by one of them is as aligned as the number
            that it is of.
    """
    flow = _Flow(ptx, frozenset(aligned))
    found = []
    for access in _accesses(ptx):
        pointers, has_remainder = flow.origin(access.address)
        sizes = {itemsizes[number] for number in pointers if number in itemsizes}
        if has_remainder and sizes and access.nbytes > max(sizes):
            found.append(access.instruction)
    return found


def _accesses(ptx: str) -> Iterator[Access]:
    for line in map(str.strip, ptx.splitlines()):
        found = re.search(r"\b(?:ld|st)\.global(?:\.\w+|::\w+)*?(?:\.v(\d))?\.[busf](\d+)\s", line)
        if found:
            nbytes = int(found[1] or 1) * int(found[2]) // 8
            yield Access(line, _ADDRESS.search(line)[1], nbytes)  # type: ignore[index]
        elif "cp.async" in line and ".shared.global" in line:
            _, source = _ADDRESS.findall(line)[:2]
            yield Access(line, source, int(re.findall(r"0x[0-9a-f]+", line)[0], 16))


class _Flow:
    """Which values a register's address is made of."""

    def __init__(self, ptx: str, aligned: frozenset[int]) -> None:
        self._aligned = aligned
        self._made: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
        for line in ptx.splitlines():
            found = _INSTRUCTION.match(line.strip())
            if found and not found[1].startswith(("st.", "ld.global", "ld.shared")):
                self._made[found[2]].append((found[1], found[3]))
        for first, second, pair in _HALVES.findall(ptx):
            self._unpack((first, second), pair)

    def _unpack(self, halves: tuple[str, str], pair: str) -> None:
        """Two values that were put into one register, and are taken out of it again."""
        for place, half in enumerate(halves):
            for _, operands in self._made[pair]:
                packed = _REGISTER.findall(operands) if operands.startswith("{") else []
                self._made[half].append(("mov.b32", packed[place] if len(packed) == 2 else pair))

    def origin(self, register: str) -> tuple[set[int], bool]:
        """The parameters that it is made of, by number; and whether by an unscaled remainder."""
        parameters: set[int] = set()
        has_remainder = False
        ahead, seen = [register], {register}
        while ahead:
            for operation, operands in self._made[ahead.pop()]:
                if operation.startswith("ld.param"):
                    parameters.update(map(int, _PARAMETER.findall(operands)))
                elif operation.startswith("rem.") and not self._is_aligned(operands):
                    has_remainder = True
                else:
                    sources = set(_unscaled(operation, operands)) - seen
                    seen |= sources
                    ahead += sources
        return parameters, has_remainder

    def _is_aligned(self, operands: str) -> bool:
        """Whether 16 divides the divisor of a remainder."""
        divisor = operands.split(",")[1].strip()
        made = self._made[divisor]
        while len(made) == 1 and made[0][0].startswith("mov."):
            made = self._made[made[0][1].strip()]
        parameters = [set(map(int, _PARAMETER.findall(operands))) for _, operands in made]
        return bool(parameters) and all(each and each <= self._aligned for each in parameters)


def _unscaled(operation: str, operands: str) -> list[str]:
    """The registers of an instruction, without the factors of a product that keeps them aligned."""
    name = operation.split(".")[0]
    if name not in ("mul", "mad", "shl", "fma"):
        return _REGISTER.findall(operands)
    left, right, *added = (each.strip() for each in operands.split(","))
    keeps = [left, right]
    if left.startswith("%") and right.startswith("%"):
        keeps = []  # times a stride
    elif not right.startswith("%"):
        factor = 1 << int(right, 0) if name == "shl" else int(right, 0)
        keeps = [] if factor % _LINE == 0 else [left]
    return [one for one in (*keeps, *added) if one.startswith("%")]
