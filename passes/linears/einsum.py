"""Einsum equations that are linear maps: ``"bsk,hkd->bshd"`` with a weight ``[h, k, d]``.

An index of the weight is either *contracted* (in the activation, not in the output) or an *output*
index (in the output, not in the activation). Then, with ``*`` the activation's other indices,

    y[*, N] = x[*, K] @ w[N, K]ᵀ,   K = all contracted, N = all output indices, flattened.
"""

import math
import string
from typing import Any

from int8fx.passes.graph.values import same_size

# one call: the method's name, then its arguments
Call = tuple
Form = tuple[list[Call], list[Call], list[Call]]


def linear_map(
    equation: str, weight_side: int, weight_shape: tuple[int, ...], x_shape: tuple[int, ...]
) -> Form | str:
    """The calls that bring x to ``[*, K]``, the weight to ``[N, K]`` and ``[*, N]`` to the output.

    Args:
        equation: of two operands, ``->`` may be missing, an ellipsis may stand for x's batch.
        weight_side: 0 when the first operand is the weight, else 1.

    Returns:
        Calls for x, for the weight and for y; or why the equation is no linear map.
    """
    parsed = _parse(equation, weight_side, len(weight_shape), len(x_shape))
    if isinstance(parsed, str):
        return parsed
    x, weight, y = parsed
    if len(set(x)) != len(x) or len(set(weight)) != len(weight):
        return f"einsum {equation!r} repeats an index within an operand (a diagonal)"
    contracted = [index for index in weight if index in x and index not in y]
    outputs = [index for index in weight if index in y and index not in x]
    if len(contracted) + len(outputs) != len(weight):
        shared = [index for index in weight if index not in contracted + outputs]
        return f"einsum {equation!r} has weight indices that are batched or summed alone: {shared}"
    batch = [index for index in x if index not in contracted]
    if any(index not in y for index in batch) or not contracted or not outputs:
        return f"einsum {equation!r} is no product over shared indices"

    size, x_size = dict(zip(weight, weight_shape, strict=True)), dict(zip(x, x_shape, strict=True))
    broadcast = [index for index in contracted if not same_size(size[index], x_size[index])]
    if broadcast:
        return f"einsum {equation!r} broadcasts a contracted index: {broadcast}"
    K = math.prod(size[index] for index in contracted)
    N = math.prod(size[index] for index in outputs)
    x_calls = _permute(x, batch + contracted)
    if len(contracted) > 1:
        x_calls.append(("flatten", len(batch)))
    weight_calls = [*_permute(weight, outputs + contracted), ("reshape", N, K)]
    y_calls: list[Call] = []
    if len(outputs) > 1:
        y_calls.append(("unflatten", -1, tuple(size[index] for index in outputs)))
    y_calls += _permute(batch + outputs, y)
    return x_calls, weight_calls, y_calls


def tensordot_equation(dims: Any, left_rank: int, right_rank: int) -> str:
    """``torch.tensordot`` as an einsum.

    Args:
        dims: how many of the last dimensions of the left and of the first of the right are contracted,
            or the dimensions of either.
    """
    if isinstance(dims, int):
        dims = range(left_rank - dims, left_rank), range(dims)
    letters = string.ascii_lowercase
    left, right = list(letters[:left_rank]), list(letters[left_rank : left_rank + right_rank])
    contracted = [left[dim] for dim in dims[0]]
    for letter, dim in zip(contracted, dims[1], strict=True):
        right[dim] = letter
    output = [letter for letter in left + right if letter not in contracted]
    return f"{''.join(left)},{''.join(right)}->{''.join(output)}"


def _permute(have: list[str], want: list[str]) -> list[Call]:
    return [] if have == want else [("permute", *(have.index(index) for index in want))]


def _parse(
    equation: str, weight_side: int, weight_rank: int, x_rank: int
) -> tuple[list[str], list[str], list[str]] | str:
    left, arrow, output = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    weight, x = operands[weight_side], operands[1 - weight_side]
    if "..." in weight:
        return f"einsum {equation!r} has an ellipsis in the weight"
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    ellipsis = "".join(spare[: x_rank - (len(x) - 3)]) if "..." in x else ""
    if not arrow:
        letters = sorted(letter for letter in set(left) - set(",.") if left.count(letter) == 1)
        output = ("..." if "..." in x else "") + "".join(letters)
    if "..." in x and "..." not in output:
        return f"einsum {equation!r} sums over an ellipsis"
    x, output = x.replace("...", ellipsis), output.replace("...", ellipsis)
    if len(weight) != weight_rank or len(x) != x_rank:
        return f"einsum {equation!r} does not fit its operands"
    return list(x), list(weight), list(output)
