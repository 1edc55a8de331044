"""What the passes may know of a compile."""

import functools

from int8fx import torch_private
from int8fx.compiler.compilation import Compilation
from int8fx.compiler.weight_inputs import packed_key
from int8fx.kernels import table
from int8fx.kernels.schemes.static_columns import OPERATOR as ROTATED
from int8fx.kernels.schemes.table import quantizers
from int8fx.passes.contract import Context
from int8fx.passes.linears.candidate import Accepted, Candidate


def context_of(compilation: Compilation, for_inductor: bool) -> Context:
    """The context of the passes, once the weights are quantised.

    Args:
        for_inductor: whether Inductor compiles the graphs.
    """
    return Context(
        fake_mode=compilation.fake_mode,
        find_memory=compilation.memory,
        devices=tuple(sorted(compilation.devices)),
        needs_autograd=compilation.needs_autograd,
        for_inductor=for_inductor,
        cpp_wrapper=compilation.cpp_wrapper,
        quantizers=quantizers(),
        joined=table.joined,
        normed=table.normed,
        joined_by=table.joined_by,
        joined_rotated=functools.partial(table.joined_by, ROTATED),
        normed_rotated=functools.partial(table.normed_by, ROTATED),
        experts=table.experts,
        attends=table.attends,
        root=compilation.root.graph,
        length_now=torch_private.length_now,
        makes_constants=functools.partial(torch_private.makes_constants, compilation.fake_mode),
        subgraph_call=torch_private.subgraph_call(),
        accepted=[_accepted(compilation, candidate) for candidate in compilation.accepted],
    )


def _accepted(compilation: Compilation, candidate: Candidate) -> Accepted:
    if candidate.weight is None:
        return Accepted(candidate)
    weight = compilation.packed_nodes[packed_key(compilation, candidate)]
    return Accepted(candidate, weight, compilation.products[candidate])
