"""Tensors inside poisoned memory: reads and writes out of bounds show.

    x = poisoned(x)          # the same values, NaN or -86 all around them
    kernel[grid](x, y)
    assert_intact(x, y)      # nothing outside was written

A value that was read from outside spreads into the result (NaN), or makes an integer result differ
from the one without the poison; a write outside changes the poison.
"""

import torch
from torch import Tensor

MARGIN = 4096  # elements on each side; a multiple of every alignment that a kernel may assume
_INTEGER_POISON = -86  # 0xAA


def poisoned(tensor: Tensor) -> Tensor:
    """A contiguous copy in the middle of a larger allocation whose other elements are poison."""
    flat = torch.full((tensor.numel() + 2 * MARGIN,), _poison(tensor.dtype), dtype=tensor.dtype)
    inner = flat[MARGIN : MARGIN + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner


def poisoned_like(tensor: Tensor) -> Tensor:
    """As ``poisoned``, with poison inside as well: what a kernel does not write stays visible."""
    return poisoned(torch.full_like(tensor, _poison(tensor.dtype)))


def assert_intact(*tensors: Tensor) -> None:
    """Raises:
    AssertionError: something around one of the tensors was overwritten.
    """
    for number, tensor in enumerate(tensors):
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        margins = torch.cat([storage[:MARGIN], storage[MARGIN + tensor.numel() :]])
        expected = torch.full_like(margins, _poison(tensor.dtype))
        assert torch.equal(margins.view(torch.uint8), expected.view(torch.uint8)), (
            f"memory around tensor {number}, of shape {tuple(tensor.shape)}, was overwritten"
        )


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    if dtype == torch.uint8:
        return _INTEGER_POISON & 0xFF
    return True if dtype == torch.bool else _INTEGER_POISON
