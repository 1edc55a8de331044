"""A model whose linears are switched between float and several schemes, in one trace.

The graph runs operator by operator, as in ``observe.py``, and from the first linear that is switched
(``rerun.py``). It holds weights in one format; those of ways with another come from the store.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from int8fx import torch_private
from int8fx.analysis.metrics import Reference
from int8fx.analysis.rerun import Rerun
from int8fx.compiler.compilation import Compilation
from int8fx.compiler.pipeline import rewrite_graph
from int8fx.kernels.formats.format import WeightFormat
from int8fx.kernels.ops.expert_linear import routed_rows
from int8fx.kernels.schemes.scheme import Choice, eagerly
from int8fx.options import Options, in_use, of_way
from int8fx.passes.linears.candidate import Candidate, Product
from int8fx.weights.store import WeightStore


class Mixtures:
    """Answers how far any mixture is from the float model, on one input.

    Attributes:
        paths: of the linears that may be quantised, in the order in which they run.
        skipped: patterns for what the options leave in float.
        float_bytes: of the model's parameters and buffers.
        ruled_bytes: what the weights save that the options have a rule for. Here they stay in float.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        ways: Mapping[str, tuple[str, Mapping[str, Any]]],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            ways: a scheme and its settings, by name.
            options: what is decided already: ``rules``, ``skip``, ``only``, settings, and a calibration
                for the ways that keep columns.
        """
        self.paths: list[str] = []
        self.skipped: list[str] = []
        self.float_bytes = self.ruled_bytes = 0
        self._options = Options.parse(in_use(options or {}))
        self._of_ways = {
            way: Options.parse(of_way(scheme, settings, options or {}))
            for way, (scheme, settings) in ways.items()
        }
        self._active: Mapping[str, str] = {}
        self._switches: dict[Any, str] = {}
        self._ways: dict[str, tuple[str, ...]] = {}
        self._noise: dict[str, dict[str, float]] | None = None
        self._bytes: dict[str, tuple[int, dict[str, int]]] = {}
        self._ruled: set[str] = set()
        self._store = WeightStore()
        self._model = model = torch_private.uncompiled(model)
        if isinstance(model, torch.nn.Module):
            tensors = (*model.parameters(), *model.buffers())
            self.float_bytes = sum(tensor.nbytes for tensor in tensors)
        self._run = torch_private.compile_apart(model, self._backend)
        self._args, self._kwargs = args, kwargs
        self._expected = Reference(self._logits({}))

    def nbytes(self, path: str) -> tuple[int, dict[str, int]]:
        """Of a linear's weight, in float and in each way."""
        return self._bytes[path]

    def ways_of(self, path: str) -> tuple[str, ...]:
        """Those that have a product for a linear."""
        return self._ways[path]

    def kl(self, mixture: Mapping[str, str]) -> float:
        """Mean KL divergence, in nats, with these linears quantised, each in its way."""
        return self._mean_kl(self._logits(mixture))

    def kl_of(self, options: Mapping[str, Any]) -> float:
        """The same of the model as the backend rewrites it with these options, traced anew.

        For ``llm.int8`` the two agree bit for bit on a CPU. ``w8a16`` has a product of its own in the
        backend's graph, whose sums differ in the last bit from those here; a rounding to int8 behind it
        flips, and that spreads: SmolLM2's divergences over 256 tokens differ by some per cent. This one
        is the user's.
        """
        checked = Options.parse(options)

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return rewrite_graph(gm, inputs, checked, self._store)

        run = torch_private.compile_apart(self._model, backend)
        return self._mean_kl(self._logits_of(run))

    def _mean_kl(self, logits: Tensor) -> float:
        return self._expected.kl(logits).double().mean().item()

    def noise(self) -> dict[str, dict[str, float]]:
        """Of each linear, the squared error of its output in each way, on the float model's input.

        A way is missing whose scheme has no product for experts, where the linear is one of theirs.
        """
        self._noise = {path: dict.fromkeys(self._ways[path], 0.0) for path in self.paths}
        self._logits({})
        noise, self._noise = self._noise, None
        return noise

    def _logits(self, mixture: Mapping[str, str]) -> Tensor:
        self._active = mixture
        return self._logits_of(self._run)

    @torch.no_grad()
    def _logits_of(self, run: Callable[..., Any]) -> Tensor:
        output = run(*self._args, **self._kwargs)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise TypeError(
                f"the model answers with a {type(output).__name__}; needed are logits, a tensor or an "
                "attribute of that name"
            )
        return logits.reshape(-1, logits.shape[-1])

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return rewrite_graph(gm, inputs, self._options, self._store, self._watch, self._runner)

    def _runner(self, gm: fx.GraphModule) -> Callable[..., Any]:
        rerun = Rerun(gm)
        nodes = list(gm.graph.nodes)
        switches = [
            (node, self._switches[node.target]) for node in nodes if node.target in self._switches
        ]
        # Graphs inside of this one may hold switched linears, too.
        inner = [node for node in nodes if node.op == "get_attr"]

        def run(*inputs: Any) -> Any:
            switched = [node for node, path in switches if path in self._active]
            return rerun.run_from([*inner, *switched], inputs)

        return run

    def _watch(self, compilation: Compilation) -> None:
        for candidate, decision in zip(compilation.found, compilation.decisions, strict=True):
            if candidate in compilation.choices:
                assert decision.shape is not None
                self._add(compilation, candidate, decision.path, decision.shape)
            elif decision.reason.startswith("skip:"):
                self.skipped.append(decision.path)

    def _add(
        self, compilation: Compilation, candidate: Candidate, path: str, shape: tuple[int, int]
    ) -> None:
        assert candidate.weight is not None
        weight_format = compilation.choices[candidate].weight_format
        compilation.products[candidate] = self._product(candidate, path, shape, weight_format)
        if path in self._bytes or path in self._ruled:
            return
        tensor = compilation.tensors[candidate.weight.placeholder]
        packed = self._store.get(tensor, candidate.weight, weight_format)
        if self._options.rule(path) is not None:
            self._ruled.add(path)
            self.ruled_bytes += packed.float_bytes - packed.nbytes
        else:
            of_ways = {
                way: self._store.get(
                    tensor, candidate.weight, _choice(self._of_ways[way], path, shape).weight_format
                ).nbytes
                for way in self._ways[path]
            }
            self._bytes[path] = (packed.float_bytes, of_ways)
            self.paths.append(path)

    def _product(
        self, candidate: Candidate, path: str, shape: tuple[int, int], in_graph: WeightFormat
    ) -> Product:
        expression = candidate.weight
        assert expression is not None
        routed = candidate.routing is not None
        in_float = _experts_in_float if routed else F.linear
        ways = {
            way: self._lowering(candidate, choice, in_graph)
            for way, options in self._of_ways.items()
            if (choice := _choice(options, path, shape)).scheme.experts is not None or not routed
        }
        self._ways[path] = tuple(ways)

        def switched(x: Tensor, weight: Tensor, last: Any, *packed: Tensor) -> Tensor:
            if path in self._active:
                return ways[self._active[path]](x, weight, last, packed)
            y = in_float(x, expression.evaluate(weight).to(x.dtype), last)
            if self._noise is not None and path in self._noise:
                for way, lower in ways.items():
                    error = lower(x, weight, last, packed).double() - y
                    self._noise[path][way] += error.square().sum().item()
            return y

        self._switches[switched] = path

        def emit(call: Any, x: fx.Node, packed: Sequence[fx.Node], last: Any) -> fx.Node:
            return call(switched, x, candidate.scope.lift(expression.placeholder), last, *packed)

        return emit

    def _lowering(
        self, candidate: Candidate, choice: Choice, in_graph: WeightFormat
    ) -> Callable[[Tensor, Tensor, Any, Sequence[Tensor]], Tensor]:
        """``(x, float weight, bias or routing, packed weight) -> y``.

        The packed weight is of the graph's format; another one comes from the store.
        """
        lower = choice.lower if candidate.routing is None else choice.lower_experts
        expression = candidate.weight
        assert expression is not None

        def product(x: Tensor, weight: Tensor, last: Any, packed: Sequence[Tensor]) -> Tensor:
            if choice.weight_format.name != in_graph.name:
                packed = self._store.get(weight, expression, choice.weight_format).tensors
            return lower(eagerly, x, packed, last)

        return product


def _choice(options: Options, path: str, shape: tuple[int, int]) -> Choice:
    """The scheme of a linear with its columns, by options of one way."""
    return options.calibrated(options.chosen, path, shape)


def _experts_in_float(
    x: Tensor, weight: Tensor, routing: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """``x[s] @ weight[e]ᵀ`` for the expert e of each row: ``[S, K], [E, N, K]`` to ``[S, N]``."""
    y = x.new_zeros((x.shape[0], weight.shape[1]))
    if not torch_private.is_fake(x):
        for expert, rows in routed_rows(*routing, weight.shape[0]):
            y[rows] = F.linear(x[rows], weight[expert])
    return y
