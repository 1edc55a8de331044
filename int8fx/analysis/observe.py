"""Watching a model run in int8: one run of the rewritten graph, without Inductor.

Dynamo traces the model as for ``torch.compile``, the same steps choose and rewrite its linears
(``pipeline.rewrite_graph``), and the graph then runs operator by operator, with each quantised linear
wrapped by an observer. An observer sees the input that the linear really gets, computes the output
also from the float weight, and adds up what it sees, so nothing of the activations is kept.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from int8fx import torch_private
from int8fx.analysis.explanation.record import GraphBreak
from int8fx.compiler.compilation import Compilation
from int8fx.compiler.pipeline import outcomes_of, rewrite_graph
from int8fx.kernels.schemes.rotated import without_rotation
from int8fx.kernels.schemes.scheme import Choice, eagerly
from int8fx.options import Options
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.flops import flops
from int8fx.passes.graph.weight_expression import WeightExpression
from int8fx.passes.linears.candidate import Candidate, Product
from int8fx.passes.linears.decision import Decision
from int8fx.passes.outcome import Outcome
from int8fx.weights.store import WeightStore
from int8fx.weights.tensor import in_float

# The thresholds that the sensitivity is measured at; 0 is no decomposition.
THRESHOLDS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 0.0)

LinearId = tuple[int, int]  # the number of the graph, and of the candidate in it


@dataclass(frozen=True)
class WeightMemory:
    """The memory of one weight: what it is, and its bytes in float and as the scheme keeps it."""

    identity: tuple[Any, ...]
    float_bytes: int
    kept_bytes: int


@dataclass
class LinearStatistics:
    """What was seen of one linear, over all its calls.

    Attributes:
        stored: its weight; None when both operands are activations.
        calls, rows: how often it ran, and on how many rows of ``x [*, K]`` in total.
        channel_absmax: ``[K]``, the largest ``|x|`` of each input channel; None before a call.
        outlier_columns: ``[K]`` bool, where ``|x| >= threshold`` in any row; None without a threshold.
        outlier_elements: how many elements are.
        signal, noise: sums of squares of the float output, and of the difference to it.
        noise_at: the same difference at each of ``THRESHOLDS``, for a scheme that has one.
        noise_unrotated: the same difference without the rotation of a scheme that has one.
    """

    stored: WeightMemory | None = None
    calls: int = 0
    rows: int = 0
    channel_absmax: Tensor | None = None
    outlier_columns: Tensor | None = None
    outlier_elements: int = 0
    signal: float = 0.0
    noise: float = 0.0
    noise_at: dict[float, float] = field(default_factory=dict)
    noise_unrotated: float | None = None

    def add_input(self, x: Tensor, threshold: float) -> None:
        """``x [*, K]`` of one call; threshold 0: nothing is an outlier."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32).abs()
        self.calls += 1
        self.rows += rows.shape[0]
        absmax = rows.amax(0).cpu() if len(rows) else torch.zeros(rows.shape[1])
        self.channel_absmax = _either(torch.maximum, self.channel_absmax, absmax)
        if threshold == 0:
            return
        outlier = rows >= threshold
        columns = outlier.any(0).cpu()
        self.outlier_elements += int(outlier.sum())
        self.outlier_columns = _either(torch.logical_or, self.outlier_columns, columns)


def _either(join: Callable[[Tensor, Tensor], Tensor], before: Tensor | None, now: Tensor) -> Tensor:
    return now if before is None else join(before, now)


@dataclass(frozen=True)
class Graph:
    """One graph that Dynamo made of the model.

    Attributes:
        decisions: of all its candidates.
        choices: the scheme and settings of the accepted ones, by number.
        flops: of each candidate, for one call.
        other_flops: of everything else, for one run.
        unused: the user's patterns that decide on nothing in it.
    """

    decisions: tuple[Decision, ...]
    choices: dict[int, Choice]
    flops: tuple[int, ...]
    other_flops: int
    unused: tuple[str, ...]


class Observation:
    """What one run of a model showed.

    Attributes:
        graphs: what Dynamo made of the model.
        runs: how often each graph ran.
        by_linear: what was seen, by graph, candidate and module path: modules that share a
            graph are told apart.
        outcomes: of the passes, by graph, were it compiled.
        breaks: Dynamo's graph breaks.
        recompiles: why frames were compiled again.
    """

    def __init__(
        self,
        model: Any,
        options: Options,
        on_linear: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """
        Args:
            on_linear: told how many calls of linears were seen, and how many are watched.
        """
        self.graphs: list[Graph] = []
        self.devices: frozenset[str] = frozenset()
        self.runs: list[int] = []
        self.by_linear: dict[tuple[LinearId, str], LinearStatistics] = {}
        self.outcomes: list[list[Outcome]] = []
        self.breaks: tuple[GraphBreak, ...] = ()
        self.recompiles: tuple[str, ...] = ()
        self._options = options
        self._names = dict(_names(model))
        self._modules = dict(_module_paths(model))
        self._store = WeightStore()
        self._recompiled: list[str] = []
        self._on_linear = on_linear
        self._calls = self._watched = 0

    @torch.no_grad()
    def run(self, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs ``model(*args, **kwargs)`` once, in int8 and observed; its output."""
        breaks_before = len(torch_private.graph_break_reasons())
        output = torch_private.compile_apart(model, self._backend)(*args, **kwargs)
        # Frames that could not be inlined at first are traced again, and break at the same place.
        found = dict.fromkeys(torch_private.graph_break_reasons()[breaks_before:])
        self.breaks = tuple(GraphBreak(reason, where) for reason, where in found)
        reasons = torch_private.recompile_reasons()
        self.recompiles = tuple(reasons.get(each, "unknown reason") for each in self._recompiled)
        self._store = WeightStore()  # Dynamo may keep the graphs for a while; the weights go now
        return output

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compile_id, earlier = torch_private.current_compile()
        if earlier:
            self._recompiled.append(compile_id)
        number = len(self.graphs)
        self.runs.append(0)
        # What is observed are calls that no pass knows: they are tried on a graph of their own.
        self.outcomes.append(outcomes_of(gm, inputs, self._options, self._store))
        rewritten = rewrite_graph(
            gm, inputs, self._options, self._store, lambda compilation: self._watch(number, compilation)
        )

        def call(*args: Any) -> Any:
            self.runs[number] += 1
            return rewritten(*args)

        return call

    def _watch(self, number: int, compilation: Compilation) -> None:
        """Records what was decided on a graph, and wraps what it computes."""
        self.graphs.append(_graph(compilation))
        self.devices |= compilation.devices
        for index, candidate in enumerate(compilation.found):
            path = self._path(candidate, compilation.decisions[index].path)
            observer = _Observer(self, (number, index), path, candidate)
            if candidate.weight is None:
                observer.seen(None)
            else:
                # Seen at least as it was compiled, should it not run (a branch that is not taken).
                tensor = compilation.tensors[candidate.weight.placeholder]
                observer.seen(tensor, compilation.choices.get(candidate))
            if candidate.routing is None and candidate.weight is not None:
                self._watched += 1
            if candidate.routing is not None:
                continue  # its rows meet several matrices: what was decided is shown, and no statistics
            if candidate in compilation.choices:
                product = observer.product(compilation.choices[candidate])
                compilation.products[candidate] = product
            elif candidate.x is not None:
                observer.insert(compilation)

    def linear_ran(self) -> None:
        """An observer saw a call; of a graph that runs often there are more than are watched."""
        self._calls += 1
        self._on_linear(self._calls, max(self._calls, self._watched))

    def _path(self, candidate: Candidate, path: str) -> str:
        """The module in whose forward a candidate is; Dynamo's path is that of the first tied one."""
        stack = candidate.node.meta.get("nn_module_stack") or {"": None}
        module = self._modules.get(list(stack)[-1].partition("@")[0])
        if module is None:
            return path
        if candidate.weight is not None:
            return module
        return f"{module}.{re.sub(r'_[0-9]+$', '', candidate.node.name)}"

    def stored(
        self, tensor: Tensor, expression: WeightExpression, choice: Choice | None
    ) -> WeightMemory:
        """The memory of a weight; without a choice it stays in float."""
        identity = (id(tensor), expression.recipe)
        if choice is None:
            return WeightMemory(identity, tensor.nbytes, tensor.nbytes)
        packed = self._store.get(tensor, expression, choice.weight_format)
        return WeightMemory((*identity, choice.weight_format.name), packed.float_bytes, packed.nbytes)

    def seen(self, linear: LinearId, path: str, weight: Tensor | None) -> LinearStatistics:
        """What was seen so far of a linear, in the module ``path`` when it was compiled."""
        names = self._names.get(id(weight), [path])
        return self.by_linear.setdefault(
            (linear, path if path in names else names[0]), LinearStatistics()
        )


class _Observer:
    """Of one candidate."""

    def __init__(
        self, observation: Observation, linear: LinearId, path: str, candidate: Candidate
    ) -> None:
        self._observation = observation
        self._linear = linear
        self._path = path
        self._candidate = candidate

    def seen(self, weight: Tensor | None, choice: Choice | None = None) -> LinearStatistics:
        """The record of a weight; None when there is none."""
        seen = self._observation.seen(self._linear, self._path, weight)
        if weight is not None and seen.stored is None:
            seen.stored = self._observation.stored(weight, self._expression, choice)
        return seen

    @property
    def _expression(self) -> WeightExpression:
        assert self._candidate.weight is not None
        return self._candidate.weight

    def product(self, choice: Choice) -> Product:
        """The scheme's product, which also tells what it saw."""

        def observed(x: Tensor, weight: Tensor, bias: Tensor | None, *packed: Tensor) -> Tensor:
            y = choice.lower(eagerly, x, packed, bias)
            if not torch_private.is_fake(x):
                _record(
                    self.seen(weight, choice),
                    x,
                    self._expression.evaluate(weight),
                    bias,
                    packed,
                    y,
                    choice,
                )
                self._observation.linear_ran()
            return y

        def emit(call: Any, x: fx.Node, packed: Sequence[fx.Node], bias: fx.Node | None) -> fx.Node:
            weight = self._candidate.scope.lift(self._expression.placeholder)
            return call(observed, x, weight, bias, *packed)

        return emit

    def insert(self, compilation: Compilation) -> None:
        """Watches the input of a linear that stays in float."""
        candidate, threshold = self._candidate, compilation.options.threshold
        assert candidate.x is not None

        def observed(x: Tensor, weight: Tensor) -> Tensor:
            if not torch_private.is_fake(x):
                self.seen(weight).add_input(x, threshold)
                self._observation.linear_ran()
            return x

        with candidate.scope.graph.inserting_before(candidate.node):
            emit = Emitter(candidate.scope.graph, compilation.fake_mode, candidate.node)
            x = emit.steps(candidate.x, candidate.x_steps)
            emit.call(observed, x, candidate.scope.lift(self._expression.placeholder))


def _record(
    seen: LinearStatistics,
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    packed: Sequence[Tensor],
    y: Tensor,
    choice: Choice,
) -> None:
    """Adds one call of a quantised linear: ``x [*, K]``, ``matrix [N, K]``, ``y [*, N]``."""
    settings = choice.settings
    decomposes = "threshold" in choice.scheme.reads
    seen.add_input(x, settings.threshold if decomposes else 0.0)
    with torch.autocast(x.device.type, enabled=False):
        expected = F.linear(x.float(), in_float(matrix), None if bias is None else bias.float())
    seen.signal += _energy(expected)
    seen.noise += _energy(y.float() - expected)
    if "rotation" in choice.scheme.reads:
        unrotated = without_rotation(x, in_float(matrix), bias, settings)
        seen.noise_unrotated = (seen.noise_unrotated or 0.0) + _energy(unrotated - expected)
    if not decomposes:
        return
    for threshold in THRESHOLDS:
        other = dataclasses.replace(choice, settings=dataclasses.replace(settings, threshold=threshold))
        noise = _energy(other.lower(eagerly, x, packed, bias).float() - expected)
        seen.noise_at[threshold] = seen.noise_at.get(threshold, 0.0) + noise


def _energy(values: Tensor) -> float:
    return values.double().square().sum().item()


def _names(model: Any) -> Iterator[tuple[int, list[str]]]:
    """Module paths by the identity of the weight; tied weights have several."""
    if not isinstance(model, nn.Module):
        return
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    by_identity: dict[int, list[str]] = {}
    for name, tensor in named:
        by_identity.setdefault(id(tensor), []).append(name.removesuffix(".weight"))
    yield from by_identity.items()


def _module_paths(model: Any) -> Iterator[tuple[str, str]]:
    """Module paths by what Dynamo calls a module in ``nn_module_stack``: its identity, as text."""
    if isinstance(model, nn.Module):
        yield from ((str(id(module)), path) for path, module in model.named_modules())


def _graph(compilation: Compilation) -> Graph:
    counted = {
        node: flops(node, compilation.fake_mode, torch_private.flop_counter())
        for scope in compilation.root.walk()
        for node in scope.graph.nodes
    }
    of_candidates = tuple(counted.pop(candidate.node) for candidate in compilation.found)
    choices = {
        index: compilation.choices[candidate]
        for index, candidate in enumerate(compilation.found)
        if candidate in compilation.choices
    }
    paths = [decision.path for decision in compilation.decisions]
    return Graph(
        tuple(compilation.decisions),
        choices,
        of_candidates,
        sum(counted.values()),
        compilation.options.unused(paths),
    )
