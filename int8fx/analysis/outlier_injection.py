"""Outlier features such as large models grow by themselves, put into a small one.

Six random channels of every norm's weight are multiplied by a factor, and the columns of the linears
that read the norm divided by it. In float the function stays the same, up to rounding; the linears'
inputs have a few large channels, the same ones in every layer and token (LLM.int8(), section 4).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from int8fx.analysis.metrics import LogitsOf
from int8fx.errors import UserError

CHANNELS = 6
# Each block rounds at 2**-24 of values up to some hundreds; this, on logits of tens, is what that
# comes to, and a wrong channel or factor moves them by tens.
ALLOWED = 1e-2


def readers(layer: Any) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Each norm weight of a Llama block, with the weights of the linears that read its output."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    yield layer.input_layernorm.weight, [linear.weight for linear in projections]
    yield layer.post_attention_layernorm.weight, [mlp.gate_proj.weight, mlp.up_proj.weight]


@torch.no_grad()
def inject(model: Any, factor: float, seed: int) -> list[int]:
    """Amplifies the same random channels of every norm, in place; returns which.

    Raises:
        UserError: the model is not built of Llama's blocks; nothing was changed.
    """
    try:
        found = [pair for layer in model.model.layers for pair in readers(layer)]
    except AttributeError as error:
        raise UserError(
            "outliers can be injected into models with Llama's blocks (two norms, then q/k/v_proj and "
            f"gate/up_proj); this is a {type(model).__name__}"
        ) from error
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randperm(model.config.hidden_size, generator=generator)[:CHANNELS]
    for norm, linears in found:
        norm[channels] *= factor
        for weight in linears:
            weight[:, channels] /= factor
    return sorted(channels.tolist())


def inject_and_check(
    model: Any, factor: float, seed: int, logits: LogitsOf, token_ids: Tensor
) -> list[int]:
    """``inject``, and a proof that the model in float does not see it.

    Args:
        logits: of the model in float.
        token_ids: ``[n]``, to compare on.

    Raises:
        UserError: the logits moved by more than rounding in fp32 explains.
    """
    before = logits(token_ids[None])
    channels = inject(model, factor, seed)
    moved = (logits(token_ids[None]) - before).abs().max().item()
    if not moved <= ALLOWED:
        raise UserError(
            f"the injection moved the float model's logits by {moved:.3g}, and rounding in fp32 "
            f"explains {ALLOWED}: it is for models in float32"
        )
    return channels
