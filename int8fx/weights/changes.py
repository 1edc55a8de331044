"""Who tells the store of packed weights that float weights have changed.

A call compares its weights with what was quantised (``int8fx/weights/identity.py``). That sees every
change
that torch counts, and on a CPU every one that moves a good part of a weight. The rest is told:

- by torch's hook behind the step of every optimizer: a fused one writes without counting a version;
- by peft's layers, when they merge or unmerge an adapter: they write to ``weight.data``;
- by the user: ``refresh``.
"""

import importlib
import threading
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from int8fx.weights.store import STORE
from int8fx_autoload import after_import

_lock = threading.Lock()
_watching = False


def refresh(model: nn.Module | None = None) -> None:
    """Makes every compiled graph quantise the float weights of a model again, at its next call.

    Most changes are seen without it: what torch counts, optimizers' steps, peft's merges, and on a CPU
    whatever else moves a good part of a weight. ``refresh`` is for the rest: a few elements written
    behind torch's back (through ``.data``, numpy, dlpack or another process, or to a tensor that was
    made in inference mode, which counts no versions), and on a GPU all that is written so, or by the
    replay of a CUDA graph::

        compiled = torch.compile(model, backend="llmint8")
        compiled(x)
        model.fc.weight.detach().numpy()[3] = 0     # one row, without torch's knowledge
        int8fx.refresh(model)
        compiled(x)                                 # with the new weight

    Args:
        model: the module, compiled or not, or a part of it: its parameters and buffers count as
            changed, and so does every weight of another module that shares their memory. None stands
            for all models of this process.

    Raises:
        TypeError: names what was given instead of a module.

    Examples:
        >>> import int8fx, torch
        >>> layer = torch.nn.Linear(64, 64).requires_grad_(False)
        >>> layer.weight.numpy()[3] = 0
        >>> int8fx.refresh(layer)
    """
    if model is None:
        STORE.clear()
    elif isinstance(model, nn.Module):
        STORE.changed([*model.parameters(), *model.buffers()])
    else:
        raise TypeError(
            f"refresh: given {type(model).__name__}; allowed: a torch.nn.Module, compiled or not, or "
            "nothing for all models"
        )


def watch() -> None:
    """From now on the store is told by optimizers, and by peft, whenever that is loaded. Idempotent."""
    global _watching
    with _lock:
        if not _watching:
            # In a step that is compiled, it still runs.
            register_optimizer_step_post_hook(torch.compiler.disable(_stepped))
            after_import("peft.tuners.tuners_utils", _watch_merges)
            _watching = True


def _watch_merges() -> None:
    importlib.import_module("int8fx.integrations.peft_merges").watch_merges()


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    trained = [each for each in parameters if each.requires_grad or each.grad is not None]
    # Optimizers are given frozen parameters, too, and leave them as they are. One that is given no
    # others does without gradients, as evolution strategies do.
    STORE.changed(trained or parameters)
