"""``int8fx.calibrate``: which columns of each linear's input are largest, from a few batches.

Dynamo traces the model as for ``torch.compile``, and the graph runs operator by operator in float, with
the largest ``|x|`` of each column noted at each linear. Nothing of the activations is kept, and the
model stays as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from int8fx import torch_private
from int8fx.arguments import check_callable
from int8fx.calibration import CalibratedLinear, Calibration, calls_of
from int8fx.compiler.compilation import Compilation
from int8fx.compiler.pipeline import rewrite_graph
from int8fx.errors import CalibrationError
from int8fx.kernels.schemes.static_columns import MOST_COLUMNS
from int8fx.options import Options
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.linears.canonicalize import Candidate
from int8fx.passes.linears.select import LEAST_K
from int8fx.weights.store import WeightStore

_Key = tuple[str, tuple[int, int]]  # the path and the shape of a linear


def calibrate(
    model: Callable[..., Any],
    batches: Any,
    *,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Calibration:
    """Runs a model over some batches, and notes which columns of its linears' inputs are largest.

    A few tokens are enough: on SmolLM2-135M the columns of 64 tokens serve as well as those of 1,024.

    Args:
        model: a module or a function, compiled or not, with float weights or with int8 ones.
        batches: an iterable of what the model is called with: each a tensor, a tuple of arguments, or
            a dict of keyword arguments.
        on_batch: told how many batches are done.

    Returns:
        For the option ``calibration`` of the backend and of ``quantize_``; ``save`` writes a file.

    Raises:
        CalibrationError: there is no batch, or the model has no linear.
        TypeError: ``batches`` is a single tensor or dict, or ``model`` is no module and no function.

    Examples:
        >>> import int8fx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> x = torch.ones(4, 64)
        >>> x[:, 7] = 90.0
        >>> calibration = int8fx.calibrate(model, [x])
        >>> calibration.linears[0].path, calibration.linears[0].columns[0]
        ('0', 7)
    """
    check_callable(model, "calibrate")
    torch_private.check_torch()
    plain = torch_private.uncompiled(model)
    seen = _Seen()
    run = torch_private.compile_apart(plain, seen.backend)
    done = 0
    for args, kwargs in calls_of(batches):
        with torch.no_grad():
            run(*args, **kwargs)
        done += 1
        on_batch(done)
    if not done:
        raise CalibrationError("calibrate was given no batch; a few tokens are enough")
    if not seen.linears:
        raise CalibrationError(f"calibrate found no linear in {type(plain).__name__}")
    return seen.calibration(type(plain).__name__)


@dataclass
class _Linear:
    rows: int = 0
    absmax: Tensor | None = None

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        self.rows += len(rows)
        if len(rows):
            # NaN is no size.
            absmax = rows.to(torch.float32).abs().nan_to_num(0.0, posinf=torch.inf).amax(0).cpu()
            self.absmax = absmax if self.absmax is None else torch.maximum(self.absmax, absmax)

    def largest(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The columns with the largest ``|x|``, the largest first, and those values."""
        if self.absmax is None:
            return (), ()
        values, columns = self.absmax.sort(descending=True, stable=True)
        return tuple(columns[:MOST_COLUMNS].tolist()), tuple(values[:MOST_COLUMNS].tolist())


class _Seen:
    """What was seen, over all graphs that Dynamo makes of a model."""

    def __init__(self) -> None:
        self.linears: dict[_Key, _Linear] = {}
        self._store = WeightStore()

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return rewrite_graph(gm, inputs, Options(only=()), self._store, self._watch)

    def _watch(self, compilation: Compilation) -> None:
        for candidate, decision in zip(compilation.found, compilation.decisions, strict=True):
            shape = decision.shape
            # Weights of few columns stay in float, as the product of a rotary embedding does.
            if candidate.weight is None or candidate.x is None or shape is None or shape[1] < LEAST_K:
                continue
            linear = self.linears.setdefault((decision.path, shape), _Linear())
            _insert(compilation, candidate, linear)

    def calibration(self, model: str) -> Calibration:
        linears = tuple(
            CalibratedLinear(path, shape, *linear.largest())
            for (path, shape), linear in self.linears.items()
        )
        return Calibration(model, max(linear.rows for linear in self.linears.values()), linears)


def _insert(compilation: Compilation, candidate: Candidate, linear: _Linear) -> None:
    """Watches the input of a linear."""
    assert candidate.x is not None

    def observed(x: Tensor) -> Tensor:
        if not torch_private.is_fake(x):
            linear.add(x)
        return x

    with candidate.scope.graph.inserting_before(candidate.node):
        emit = Emitter(candidate.scope.graph, compilation.fake_mode, candidate.node)
        emit.call(observed, emit.steps(candidate.x, candidate.x_steps))
