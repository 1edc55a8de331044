"""Algorithms over a model: linears in the order that it has them, some at a time."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from int8fx.calibration import calls_of
from int8fx.kernels import packing
from int8fx.kernels.schemes.scheme import Choice
from int8fx.weights.algorithms.basis import Basis
from int8fx.weights.algorithms.methods import Method
from int8fx.weights.algorithms.moments import Moment, in_parts, second_moments
from int8fx.weights.distributed import local
from int8fx.weights.sites import Site
from int8fx.weights.tensor import QuantizedWeight


def check(
    name: str,
    method: Method | None,
    batches: Any,
    groups: Sequence[Sequence[Site]],
    choices: Mapping[str, Choice],
) -> None:
    """Raises:
    ValueError: the method does not serve a weight's scheme, or where the weight is; or there are
        batches that it does not read, or none.
    """
    needs_batches = method is not None and method.needs_batches
    if needs_batches and batches is None:
        raise ValueError(f"quantize_: method={name!r} needs batches of what the model is called with")
    if not needs_batches and batches is not None:
        raise ValueError(f"quantize_: method={name!r} reads no batches")
    if method is None:
        return
    for site in (shared[0] for shared in groups):
        refusal = method.refusal(choices[site.path])
        if not refusal and (site.weight.is_meta or local(site.weight) is not site.weight):
            refusal = "its weight is on the meta device, or in shards; allowed: whole weights"
        if refusal:
            raise ValueError(f"quantize_: method={name!r} does not serve {site.path}: {refusal}")


def solved(
    model: nn.Module,
    groups: Sequence[Sequence[Site]],
    choices: Mapping[str, Choice],
    method: Method,
    batches: Any,
) -> Iterator[tuple[Sequence[Site], nn.Parameter]]:
    """The quantised weight of each group of modules that share one.

    Batches run through the model as it is: the caller puts a weight in its place before it asks for the
    next, so that linears behind it see what it makes of them.
    """
    bases = [Basis(choices[shared[0].path]) for shared in groups]
    sizes = [
        basis.columns(shared[0].rows_and_columns[1]) if method.needs_batches else 0
        for basis, shared in zip(bases, groups, strict=True)
    ]
    calls = list(calls_of(batches)) if method.needs_batches else []
    if method.needs_batches and not calls:
        raise ValueError("quantize_ was given no batch")
    for part in in_parts(sizes):
        several = list(zip(groups[part], bases[part], strict=True))
        watched = {site.module: basis for shared, basis in several for site in shared}
        moments = second_moments(model, calls, watched) if method.needs_batches else {}
        for shared, basis in several:
            seen = [moments.pop(site.module) for site in shared if site.module in moments]
            mean = _mean(shared[0], basis, seen) if method.needs_batches else None
            yield shared, _quantized(shared[0], basis, method, mean)


def _mean(site: Site, basis: Basis, seen: Sequence[Moment]) -> Tensor:
    """Of all modules that share a weight. Where no row reached one, every column counts the same."""
    rows = sum(each.rows for each in seen)
    if not rows:
        warnings.warn(
            f"quantize_: no row of the batches reached {site.path}: its columns count the same",
            UserWarning,
            stacklevel=4,
        )
        K = basis.columns(site.rows_and_columns[1])
        return torch.eye(K, device=site.weight.device)
    means = [each.mean * (each.rows / rows) for each in seen if each.mean is not None]
    return torch.stack(means).sum(0) if len(means) > 1 else means[0]


def _quantized(site: Site, basis: Basis, method: Method, mean: Tensor | None) -> nn.Parameter:
    weight = site.weight.detach()
    matrix = weight.t() if site.transposed else weight
    N, K = matrix.shape
    found = method.solve(basis.matrix(matrix), mean, basis.grid(weight.dtype))
    stored = basis.stored(matrix, found)
    packed = packing.pack(basis.choice.weight_format, stored, N, K)
    form = {"N": N, "K": K, "dtype": weight.dtype, "transposed": site.transposed}
    made = QuantizedWeight(*packed, choice=basis.choice, **form)
    return nn.Parameter(made, requires_grad=False)
