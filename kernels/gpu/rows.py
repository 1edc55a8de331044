"""A row of an activation in chunks of columns, as many as it takes, which all stay in registers.

A block of Triton's is a power of two: of 5120 elements it would be 8192, of 14336 16384. The chunks are
a tuple, and a loop over them is unrolled.
"""

import triton
import triton.language as tl

ROW_BYTES = 32768  # of the longest row that a program keeps in registers


def chunks_of_row(K: int, chunk: int) -> dict[str, int | bool]:
    """A row of K elements in chunks, or in one shorter one."""
    chunk = min(chunk, max(32, triton.next_power_of_2(K)))
    return {"CHUNK": chunk, "CHUNKS": -(-K // chunk), "EVEN_K": K % chunk == 0}


@triton.jit
def chunk_of_columns(index, CHUNK: tl.constexpr):
    """The columns of a chunk of a row, ``[CHUNK / 8, 8]``: eight neighbours for a thread, of 16-bit as
    of int8. Else Triton would deal out 16 of int8, and values change threads on the way."""
    return index * CHUNK + 8 * tl.arange(0, CHUNK // 8)[:, None] + tl.arange(0, 8)[None, :]


@triton.jit
def appended(values, value):
    return values + (value,)  # noqa: RUF005 - Triton knows no stars


@triton.jit
def load_columns(pointer, k, K, EVEN_K: tl.constexpr):
    """What is there, and zero past the end of a row."""
    if EVEN_K:
        return tl.load(pointer + k)
    else:
        return tl.load(pointer + k, mask=k < K, other=0.0)


@triton.jit
def store_columns(pointer, k, values, K, EVEN_K: tl.constexpr):
    if EVEN_K:
        tl.store(pointer + k, values)
    else:
        tl.store(pointer + k, values, mask=k < K)
