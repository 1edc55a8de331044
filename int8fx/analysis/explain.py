"""``int8fx.explain``: one run of a model, and everything that the backend does to it."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from int8fx.analysis.explanation.explanation import Explanation
from int8fx.analysis.explanation.record import Row, Totals, decibels
from int8fx.arguments import check_callable
from int8fx.options import Options

if TYPE_CHECKING:
    from int8fx.analysis.observe import Graph, LinearStatistics, Observation


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | str | PathLike[str] | None = None,
    **kwargs: Any,
) -> Explanation:
    """What ``torch.compile(model, backend="llmint8", options=options)`` does to a model.

    Runs ``model(*args, **kwargs)`` once under ``torch.no_grad()``, its linears in int8, without
    Inductor: it takes the time of some eager runs. Compiled forms of the model, and its weights, stay
    as they are; what the model itself changes by running (a KV cache, a batch norm in training)
    changes.

    Args:
        model: a module or a function, compiled or not. A weight that is quantised already is compared
            with the float values that it stands for.
        options: those of the backend, see ``int8fx.Options``.

    Raises:
        TypeError: names what was given in the place of a model.
        ValueError: an option is unknown or out of range.

    Examples:
        >>> import int8fx, torch
        >>> layers = torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64)
        >>> model = torch.nn.Sequential(*layers)
        >>> shown = int8fx.explain(model, torch.ones(4, 64), options={"skip": ["2"]})
        >>> [(row.path, row.scheme or row.reason) for row in shown.rows]
        [('0', 'llm.int8'), ('2', "skip: matches '2'")]
    """
    return explained(model, args, kwargs, options)


def explained(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | str | PathLike[str] | None,
    *,
    name: str = "",
    on_linear: Callable[[int, int], None] = lambda done, total: None,
) -> Explanation:
    """``explain`` of a model with a name, by default its class's.

    Args:
        on_linear: told how many calls of linears are done, and of how many at least.
    """
    check_callable(model, "explain")
    checked = Options.parse(options)
    # The compile's modules are imported when they are needed, as by the backend.
    from int8fx import torch_private
    from int8fx.analysis.observe import Observation
    from int8fx.kernels import table
    from int8fx.passes.outcome import together

    torch_private.check_torch()
    model = torch_private.uncompiled(model)
    observation = Observation(model, checked, on_linear)
    observation.run(model, args, kwargs)

    others = sum(
        graph.other_flops * runs
        for graph, runs in zip(observation.graphs, observation.runs, strict=True)
    )
    rows = _in_shares(list(_rows(observation)), others)
    return Explanation(
        rows=tuple(rows),
        totals=_totals(model, rows, others),
        threshold=checked.threshold,
        kernel=table.describe(observation.devices),
        unused=_unused(observation),
        passes=together(observation.outcomes),
        graphs=len(observation.graphs),
        graph_breaks=observation.breaks,
        recompiles=observation.recompiles,
        model=name or getattr(model, "__name__", type(model).__name__),
        options=repr(options or {}),
        versions=_versions(),
        date=datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    )


def _versions() -> dict[str, str]:
    """Of what the result depends on, where it is installed."""
    found = {"python": platform.python_version()}
    for name in ("int8fx", "torch", "triton", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _rows(observation: "Observation") -> Iterator[Row]:
    counted: set[tuple] = set()
    for ((number, index), path), seen in observation.by_linear.items():
        graph = observation.graphs[number]
        counts = seen.stored is not None and seen.stored.identity not in counted
        if seen.stored is not None:
            counted.add(seen.stored.identity)
        # A product of two activations has no observer: it ran as often as its graph.
        calls = observation.runs[number] if seen.stored is None else seen.calls
        yield _row(graph, index, path, seen, calls, counts)


def _row(
    graph: "Graph", index: int, path: str, seen: "LinearStatistics", calls: int, counts: bool
) -> Row:
    decision = graph.decisions[index]
    absmax, columns = seen.channel_absmax, seen.outlier_columns
    quantized = decision.accepted and seen.calls > 0
    return Row(
        path=path,
        spelling=decision.spelling,
        shape=decision.shape,
        accepted=decision.accepted,
        reason=decision.reason,
        scheme=decision.scheme,
        note=decision.note,
        calls=calls,
        rows=seen.rows,
        outlier_columns=None if columns is None else int(columns.sum()),
        outlier_elements=None if columns is None else seen.outlier_elements,
        input_absmax=None if absmax is None else absmax.max().item(),
        sqnr_db=decibels(seen.signal, seen.noise) if quantized else None,
        sqnr_db_at={at: decibels(seen.signal, noise) for at, noise in seen.noise_at.items()},
        static_columns=tuple(getattr(graph.choices[index].settings, "columns", ()))
        if index in graph.choices
        else (),
        sqnr_db_unrotated=decibels(seen.signal, seen.noise_unrotated)
        if quantized and seen.noise_unrotated is not None
        else None,
        channel_absmax=() if absmax is None else tuple(absmax.tolist()),
        float_bytes=0 if seen.stored is None else seen.stored.float_bytes,
        kept_bytes=0 if seen.stored is None else seen.stored.kept_bytes,
        counts_bytes=counts,
        flops=graph.flops[index] * calls,
        share=0.0,
    )


def _in_shares(rows: Sequence[Row], others: int) -> list[Row]:
    total = others + sum(row.flops for row in rows)
    return [dataclasses.replace(row, share=row.flops / total if total else 0.0) for row in rows]


def _totals(model: Any, rows: Sequence[Row], others: int) -> Totals:
    accepted = [row for row in rows if row.accepted]
    counted = [row for row in accepted if row.counts_bytes]
    left = [row for row in rows if row.counts_bytes and not row.accepted]
    return Totals(
        candidates=len(rows),
        accepted=len(accepted),
        float_bytes=sum(row.float_bytes for row in counted),
        kept_bytes=sum(row.kept_bytes for row in counted),
        left_bytes=sum(row.float_bytes for row in left),
        model_bytes=_model_bytes(model),
        flops=others + sum(row.flops for row in rows),
        accepted_share=sum(row.share for row in accepted),
    )


def _model_bytes(model: Any) -> int:
    if not isinstance(model, nn.Module):
        return 0
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _unused(observation: "Observation") -> tuple[str, ...]:
    """What decides on nothing in any graph."""
    first, *rest = [graph.unused for graph in observation.graphs] or [()]
    return tuple(pattern for pattern in first if all(pattern in unused for unused in rest))
