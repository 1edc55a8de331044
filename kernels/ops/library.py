"""How an operator ``int8fx::name`` is registered."""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("int8fx", "FRAGMENT")


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """The operator of a schema, as others call it.

    Args:
        schema: as ``name(Tensor x) -> Tensor``, or ``name.overload(...)``.
        kernel: what runs where no faster kernel is registered for the device.
        fake: the same for fake tensors: the outputs' shapes and dtypes.
        setup_context: keeps what ``backward`` needs, as ``torch.library.register_autograd`` has it.
        backward: the inputs' gradients; None, there are none.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"int8fx::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"int8fx::{name}", backward, setup_context=setup_context, lib=_library
        )
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.int8fx, packet), overload or "default")
