"""What ``explain`` says of SmolLM2-135M, counted by hand."""

import math

import pytest

import int8fx
from int8fx.kernels import table
from int8fx.kernels.cpu.int8_linear import K_MULTIPLE, NR


def packed_bytes(n: int, k: int) -> int:
    """Of the layout of the CPU's C++ operator, see kernels/cpu/int8_linear.py, and of the scales."""
    kernel = table.kernel_for("cpu")
    if kernel is None or kernel.name != "C++":
        return n * (k + 4)
    blocks = math.ceil(n / NR)
    return blocks * (math.ceil(k / K_MULTIPLE) * K_MULTIPLE * NR + 4 * NR) + 4 * n


# Of one layer of SmolLM2-135M, [N, K].
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def assert_counted_by_hand(shown: int8fx.Explanation, tokens: int, vocabulary: int) -> None:
    """Of SmolLM2's 30 layers and its head: names, shapes, bytes and FLOPs."""
    layers = 30
    expected = {
        f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in SHAPES.items()
    }
    assert len(expected) == 210
    quantised = {row.path: row.shape for row in shown.rows if row.accepted}
    assert quantised == expected
    (head,) = [row for row in shown.rows if not row.accepted]
    assert (head.path, head.shape) == ("lm_head", (vocabulary, 576))
    assert head.reason == "skip: matches 'lm_head'"

    totals = shown.totals
    multiplied = layers * sum(n * k for n, k in SHAPES.values())
    # Two products of [tokens, 64] and [64, tokens] in each of nine heads; no causal mask is counted.
    attention = layers * 2 * 2 * 9 * tokens * tokens * 64
    assert (totals.candidates, totals.accepted) == (211, 210)
    assert totals.float_bytes == 4 * multiplied
    assert totals.kept_bytes == layers * sum(packed_bytes(n, k) for n, k in SHAPES.values())
    assert totals.left_bytes == 4 * vocabulary * 576
    assert totals.flops == 2 * tokens * (multiplied + vocabulary * 576) + attention
    assert totals.accepted_share == pytest.approx(2 * tokens * multiplied / totals.flops)
    assert sum(row.share for row in shown.rows) == pytest.approx(1 - attention / totals.flops)
    lines = str(shown).splitlines()
    assert max(map(len, lines)) <= 80
    listed = [line.split()[:2] for line in lines]
    for path, (n, k) in {**expected, "lm_head": (vocabulary, 576)}.items():
        assert listed.count([path, f"{n}x{k}"]) == 1
