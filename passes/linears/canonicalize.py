"""Canonicalize: every spelling of a linear map, as ``y = x @ weightᵀ + bias`` with weight ``[N, K]``.

    F.linear(x, w, b)                 x, w, b
    torch.addmm(b, x, w)              x, w.transpose(0, 1), b
    x @ w,  torch.matmul,  mm,  bmm   x, w.transpose(0, 1)
    w @ x                             x.transpose(-2, -1), w;    y.transpose(-2, -1)
    x @ w.expand(B, K, N)             x, w.transpose(0, 1);    y.expand(B, M, N)
    conv2d(x, w [N, K, 1, 1], b)      x.movedim(1, -1), w.flatten(1), b;    y.movedim(-1, 1)
    einsum("bsk,hkd->bshd", x, w)     x, w.permute(0, 2, 1).reshape(N, K);    y.unflatten(-1, (h, d))
    tensordot, inner, addbmm          as the einsum that they are
    bmm(x, w[experts])                x, w.transpose(-2, -1) [E, N, K], with a routing
    grouped_mm(x, w, offs)            the same (``passes/linears/experts.py``)

Nothing in the graph changes here: the result is a list of candidates. A candidate that cannot be
brought to this form carries the reason. The parameters of a matcher are the spelling's own, so a call
with an argument that its matcher does not have is refused, not read without it.
"""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from int8fx.passes.graph.scope import Scope
from int8fx.passes.graph.transforms import transform_of
from int8fx.passes.linears import products
from int8fx.passes.linears.candidate import Candidate
from int8fx.passes.linears.linear_form import misfit
from int8fx.passes.linears.products import Call

FUSED = (
    "fused attention, whose products are not in the graph; load the model with "
    'attn_implementation="eager" to have them in int8'
)

aten = torch.ops.aten
Matcher = Callable[..., Candidate | None]

# What is a function of torch, a method of Tensor and an operator of aten, by one name.
_EVERYWHERE: dict[str, Matcher] = {
    "matmul": products.matmul,
    "mm": products.mm,
    "bmm": products.mm,
    "addmm": products.addmm,
    "baddbmm": products.baddbmm,
    "addbmm": products.addbmm,
    "mv": products.mv,
    "addmv": products.addmv,
    "inner": products.inner,
}
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
# A spelling is what Dynamo puts into a graph: a function, the name of a Tensor method, an operator of
# aten whatever its overload, or the name of another package's operator.
SPELLINGS: dict[Any, tuple[str, Matcher]] = {
    **{getattr(torch, name): (f"torch.{name}", match) for name, match in _EVERYWHERE.items()},
    **{name: (f"Tensor.{name}", match) for name, match in _EVERYWHERE.items()},
    **{getattr(aten, name): (f"aten.{name}", match) for name, match in _EVERYWHERE.items()},
    F.linear: ("torch.nn.functional.linear", products.linear),
    aten.linear: ("aten.linear", products.linear),
    operator.matmul: ("@", products.matmul),
    "__matmul__": ("@", products.matmul),
    "__rmatmul__": ("@", products.reversed_matmul),
    operator.imatmul: ("@=", products.matmul),
    torch.linalg.matmul: ("torch.linalg.matmul", products.matmul),
    torch.tensordot: ("torch.tensordot", products.tensordot),
    torch.linalg.multi_dot: ("torch.linalg.multi_dot", products.multi_dot),
    aten.linalg_multi_dot: ("aten.linalg_multi_dot", products.multi_dot),
    torch.chain_matmul: ("torch.chain_matmul", products.chain_matmul),
    **{
        getattr(F, name): (f"torch.nn.functional.{name}", products.convolution)
        for name in _CONVOLUTIONS
    },
    **{getattr(aten, name): (f"aten.{name}", products.convolution) for name in _CONVOLUTIONS},
    torch.einsum: ("torch.einsum", products.einsum),
    torch._grouped_mm: ("torch.nn.functional.grouped_mm", products.grouped_mm),
    F.grouped_mm: ("torch.nn.functional.grouped_mm", products.grouped_mm),
    "transformers.grouped_mm_fallback": ("transformers.grouped_mm_fallback", products.grouped_fallback),
}

# A linear that is in a scheme already, and is refused.
PREPARED: dict[str, tuple[str, Matcher]] = {
    "int8fx.straight_through_linear": ("int8fx.straight_through_linear", products.straight_through),
}

# Calls with weights that are no linear map, and why. nn.MultiheadAttention, an encoder of
# torch in eval mode and the cells of recurrent networks come to one call with linears inside.
_INSIDE = "its projections are inside one fused call of torch"
_IN_PLACE = "it writes its result into its first argument"
_ADDING_IN_PLACE = ("addmm_", "addmv_", "baddbmm_", "addbmm_")
_BILINEAR = "a product of two activations and a weight: only one of one is a linear"
_FUSED_CALLS = (
    "_transformer_encoder_layer_fwd _native_multi_head_attention "
    "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"
).split()
NO_LINEARS: dict[Any, tuple[str, str]] = {
    F.multi_head_attention_forward: ("torch.nn.functional.multi_head_attention_forward", _INSIDE),
    **{getattr(torch, name): (f"torch.{name}", _INSIDE) for name in _FUSED_CALLS},
    **{getattr(aten, name): (f"aten.{name}", _INSIDE) for name in _FUSED_CALLS},
    F.bilinear: ("torch.nn.functional.bilinear", _BILINEAR),
    aten.bilinear: ("aten.bilinear", _BILINEAR),
    **{name: (f"Tensor.{name}", _IN_PLACE) for name in _ADDING_IN_PLACE},
    **{getattr(aten, name): (f"aten.{name}", _IN_PLACE) for name in _ADDING_IN_PLACE},
}


def candidates(
    root: Scope, path_of: Callable[[fx.Node], str | None], attention: bool = False
) -> list[Candidate]:
    """Every linear or matmul below ``root``, in the order in which they run.

    Args:
        path_of: the module path of a parameter or a buffer, of a placeholder of ``root``; or None.
        attention: whether fused attention counts as one, too. It is refused: to take it apart would
            write the probabilities to memory, which it is there to avoid.
    """
    found = []
    for scope in root.walk():
        for node in scope.graph.nodes:
            if node.op not in ("call_function", "call_method"):
                continue
            target = getattr(node.target, "overloadpacket", node.target)
            # Operators of other packages are known by name: they need not be there.
            name = str(target)
            entry = SPELLINGS.get(target) or SPELLINGS.get(name) or PREPARED.get(name)
            if entry is not None:
                spelling, match = entry
                candidate = _match(Call(node, scope, spelling, path_of), match)
                if candidate is not None and (transform := transform_of(node)):
                    candidate.factors = None
                    candidate.refused(transform)
                found += [] if candidate is None else [candidate]
            elif target in NO_LINEARS:
                spelling, reason = NO_LINEARS[target]
                found.append(Candidate(node, scope, spelling).refused(reason))
            elif attention and node.target is F.scaled_dot_product_attention:
                spelling = "torch.nn.functional.scaled_dot_product_attention"
                found.append(Candidate(node, scope, spelling).refused(FUSED))
    return found


# What spellings of one matcher call its arguments.
_ALIASES = {"self": "input", "mat_a": "input", "mat_b": "mat2"}


def _match(call: Call, match: Matcher) -> Candidate | None:
    """The candidate that a call is, in a form that computes the same; None if it is no linear map."""
    given = {_ALIASES.get(name, name): value for name, value in call.node.kwargs.items()}
    if given.pop("out", None) is not None:
        return call.refused(products.WRITES_OUT)
    try:
        bound = inspect.signature(match).bind(call, *call.node.args, **given)
    except TypeError as error:
        return call.refused(f"called as no linear map: {error}")
    candidate = match(*bound.args, **bound.kwargs)
    if candidate is not None and not candidate.refusal and (reason := misfit(candidate)):
        return candidate.refused(reason)
    return candidate
