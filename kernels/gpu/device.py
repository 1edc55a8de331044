"""Whether the GPU of this process can run the kernels of this folder."""

import importlib.util
from typing import Any

import torch

# The first with asynchronous copies and int8 matrix instructions that Triton generates.
_OLDEST = (8, 0)
_AMD = ("gfx90a", "gfx942")


def load() -> str | None:
    """Registers the operators of this folder; or the reason why this GPU cannot run them."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    reason = unsupported(torch.cuda.get_device_properties(0))
    if reason is None:
        import int8fx.kernels.gpu.experts
        import int8fx.kernels.gpu.grouped
        import int8fx.kernels.gpu.normed
        import int8fx.kernels.gpu.rotated  # noqa: F401
    return reason


def unsupported(properties: Any) -> str | None:
    """Why a GPU with such properties cannot run the kernels, or None."""
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
        return None if arch in _AMD else f"{arch} is none of {', '.join(_AMD)}"
    if (properties.major, properties.minor) < _OLDEST:
        return (
            f"{properties.name} is sm_{properties.major}{properties.minor}; int8 matrix "
            f"instructions that Triton generates start at sm_{_OLDEST[0]}{_OLDEST[1]}"
        )
    return None


# Whose product of up to MAX_M rows reads the weight in int8, where a 16-bit one reads twice as much.
# More rows are a product in 16-bit all the same, of a weight that has to be converted first.
_WEIGHT_ONLY = "w8a16"


def slower(scheme: str, rows: Any) -> str:
    """Why a scheme's product of so many rows would be slower than the 16-bit one, or empty.

    Args:
        rows: an int; or a SymInt, a number that varies.
    """
    from int8fx.kernels.gpu.decode import MAX_M

    if scheme != _WEIGHT_ONLY or (isinstance(rows, int) and rows <= MAX_M):
        return ""
    given = rows if isinstance(rows, int) else "a number that varies"
    return (
        f"scheme {scheme!r} on a GPU is faster than 16-bit up to {MAX_M} rows, and slower above; "
        f"here the input has {given}"
    )


def operator() -> tuple[Any, int]:
    """The operator that quantises and multiplies, and how many linears it takes at most."""
    from int8fx.kernels.gpu.groups import MAX_GROUP

    return torch.ops.int8fx.int8_linears_gpu.default, MAX_GROUP


def norm_operator() -> Any:
    """The operator that takes the place of a norm and of that which reads it."""
    return torch.ops.int8fx.normed_linears_gpu.default


def rotated_operator() -> tuple[Any, int]:
    """The same as ``operator`` of rows that are rotated."""
    from int8fx.kernels.gpu.groups import MAX_GROUP

    return torch.ops.int8fx.rotated_linears_gpu.default, MAX_GROUP


def rotated_norm_operator() -> Any:
    """The same as ``norm_operator`` of rows that are rotated."""
    return torch.ops.int8fx.normed_rotated_linears_gpu.default


def grouped_operator() -> tuple[Any, int]:
    """The same of 4-bit weights by groups, with rows in int8."""
    from int8fx.kernels.gpu.groups import MAX_GROUP

    return torch.ops.int8fx.grouped_linears_gpu.default, MAX_GROUP


def grouped_float_operator() -> tuple[Any, int]:
    """The same of 4-bit weights by groups, with rows as they are."""
    from int8fx.kernels.gpu.groups import MAX_GROUP

    return torch.ops.int8fx.grouped_float_linears_gpu.default, MAX_GROUP


def group_operator() -> tuple[Any, int]:
    """The same of int8 weights by groups, with rows as they are."""
    from int8fx.kernels.gpu.groups import MAX_GROUP

    return torch.ops.int8fx.group_linears_gpu.default, MAX_GROUP


def expert_operator() -> Any:
    """The operator that takes the place of ``int8fx::expert_linear``."""
    return torch.ops.int8fx.expert_linear_gpu.default
