"""Attention of many rows and of few: against float64 on every instruction set, and the pass."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import int8fx
from int8fx import torch_private
from int8fx.kernels import table
from int8fx.kernels.cpu import int8_linear as cpu
from int8fx.kernels.ops.attention import attention, attention_reference
from int8fx.passes.float.attend import DTYPE, FEWER_ROWS, MORE_ROWS
from int8fx.passes.float.sdpa import DROPOUT
from int8fx.testing.attentions import (
    GROUP,
    HEADS,
    Attention,
    causal,
    compare,
    inputs,
    native,
    repeat,
    repeated,
)
from int8fx.testing.bounds import attention_bound
from int8fx.testing.support import compile_once, outcome_of, reports_of
from int8fx.torch_private import compile_counts

REASON = cpu.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no CPU kernel: {REASON}")
ISAS = cpu.isas() if REASON is None else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def masks(kind, B, H, M, L, dtype):
    if kind in ("none", "causal"):
        return None
    shown = torch.rand(B, H, M, L) > 0.3
    shown[..., : L // 2, : max(1, L // 3)] = True
    if kind == "band":  # whole blocks are hidden, and shown as they are
        shown = (torch.arange(L) <= torch.arange(M)[:, None]).expand(1, 1, M, L)
    if kind == "a row hides all":
        shown[..., M // 2, :] = False
    if kind == "by key":
        shown = shown[:, :1, :1]
    if kind == "float":
        return torch.where(shown, torch.randn(B, H, M, L), -math.inf).to(dtype)
    return shown


KINDS = ("none", "causal", "each", "band", "a row hides all", "by key", "float")


def check(B, KV, G, M, L, D, DV, dtype, kind):
    q = torch.randn(B, M, KV * G, D).to(dtype).transpose(1, 2)
    k, v = (torch.randn(B, KV, L, width).to(dtype) for width in (D, DV))
    mask, scale = masks(kind, B, KV * G, M, L, dtype), 1 / math.sqrt(D)
    y = attention(q, k, v, mask, kind == "causal", scale)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    expected = attention_reference(q.double(), k.double(), v.double(), wide, kind == "causal", scale)
    assert y.dtype == dtype
    assert y.transpose(1, 2).is_contiguous()
    error = (y.double() - expected).abs().max() if y.numel() else torch.zeros(())
    assert error <= attention_bound(q, k, v, scale), f"{float(error):.3g}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_every_instruction_set_against_float64(isa, dtype, kind):
    torch.manual_seed(0)
    check(2, 2, 3, 70, 150, 20, 12, dtype, kind)
    # Few rows: keys of one head shared among threads, or many heads, and widths of every tail.
    for G, M in ((3, 1), (8, 2), (5, 1), (1, 16)):
        check(1, 2, G, M, 700, 64, 72, dtype, kind)
        check(2, 5, G, M, 150, 20, 12, dtype, kind)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_few_rows_much(threads):
    """Threads share a head's keys in parts, which changes the order of sums and nothing else."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(1, 1, 4, 1, 3000, 64, 64, torch.float32, "float")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("M", [1, 40])
def test_no_keys_are_zeros(M):
    q, k = torch.randn(1, 2, M, 8), torch.empty(1, 2, 0, 8)
    assert torch.equal(attention(q, k, k, None, False, 1.0), torch.zeros(1, 2, M, 8))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (2, 3, 3, 230, 200, 70, 70)))
    | st.tuples(*(st.integers(1, most) for most in (3, 3, 4, 4, 600, 140, 140))),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
)
def test_any_shape(sizes, dtype, kind):
    torch.manual_seed(0)
    check(*sizes, dtype, kind)


@pytest.mark.parametrize("D", [64, 65, 128, 129, 256])
def test_wide_heads(D):
    torch.manual_seed(0)
    check(1, 1, 1, 50, 70, D, D, torch.float32, "band")


@pytest.mark.parametrize("M", [9, 60])
def test_a_nan_stays_in_its_row(M):
    q, k, v = (torch.randn(1, 1, rows, 16) for rows in (M, 300, 300))
    q[0, 0, 7, 3] = math.nan
    y = attention(q, k, v, None, False, 0.25)
    assert y[0, 0, 7].isnan().all()
    assert y.isnan().sum() == 16


@pytest.mark.parametrize("M", [1, 40])
def test_large_scores_do_not_overflow(M):
    q = torch.full((1, 1, M, 16), 100.0)
    k, v = torch.full((1, 1, 300, 16), 100.0), torch.randn(1, 1, 300, 16)
    k[0, 0, 5] *= 2
    y = attention(q, k, v, None, False, 1.0)
    torch.testing.assert_close(y, v[:, :, 5:6].expand_as(y))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, mask: (q, k.half(), v, mask), "one dtype"),
        (lambda q, k, v, mask: (q, k[..., :4], v, mask), "do not fit"),
        (lambda q, k, v, mask: (q.int(), k.int(), v.int(), mask), "float32, bfloat16 or float16"),
        (lambda q, k, v, mask: (q, k, v, mask.double()), "mask must be bool"),
        (lambda q, k, v, mask: [each.repeat(1, 1, 1, 33) for each in (q, k, v)] + [mask], "no wider"),
    ],
)
def test_what_it_cannot_take_is_named(change, message):
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    with pytest.raises(RuntimeError, match=message):
        attention(*change(q, k, v, torch.ones(6, 6)), False, 1.0)


# --- the pass -------------------------------------------------------------------------------------

S = 40


def dropped(q, k, v, mask):
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), mask, dropout_p=1e-9)


def cache_written_after_the_repeat(q, k, v, mask):
    k = k.clone()
    key, value = repeat(k), repeat(v)
    k.zero_()
    return F.scaled_dot_product_attention(q, key, value, attn_mask=mask) + k.sum()


def cast(q, k, v, mask):
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), mask)


def run(attend, L=S, dtype=torch.float32):
    return compare(attend, *inputs(L, S, dtype=dtype))


@pytest.fixture
def attends(monkeypatch):
    """As on a machine without AMX."""
    monkeypatch.setattr(table, "attends", lambda device, few: True)


@pytest.mark.parametrize("L", [1, 5, S])
@pytest.mark.parametrize("attend", [repeated, native, causal], ids=lambda attend: attend.__name__)
def test_an_attention_of_many_rows_or_few_is_replaced(attends, attend, L):
    y, expected, graph = run(attend, L)
    assert "int8fx.attention" in graph
    assert "expand" not in graph
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("attend", "given"),
    [
        (repeated, {"L": 6}),
        (repeated, {"L": 31}),
        (dropped, {}),
        (cast, {"L": 1}),
        (repeated, {"dtype": torch.float64}),
    ],
    ids=["neither few", "nor many", "dropout", "autocast", "float64"],
)
def test_other_attentions_are_left_alone(attends, attend, given):
    y, expected, graph = run(attend, **given)
    assert "int8fx.attention" not in graph
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


REPEATED = {
    "key and value": lambda q, k, v, mask: (q, k[:1], v[:1], mask),
    "key": lambda q, k, v, mask: (q, k[:1], v, mask),
    "value": lambda q, k, v, mask: (q, k, v[:1], mask),
    "query": lambda q, k, v, mask: (q[:1], k, v, mask),
    "no heads": lambda q, k, v, mask: (q[:, :0], k[:, :0], v[:, :0], None),
    "no sequences": lambda q, k, v, mask: (q[:0], k[:0], v[:0], mask[:0]),
    "no query": lambda q, k, v, mask: (q[:, :, :0], k, v, None),
}


@pytest.mark.parametrize("attends", [True, False], ids=["operator", "grouped"])
@pytest.mark.parametrize("L", [1, S])
@pytest.mark.parametrize("name", REPEATED)
def test_what_is_repeated_for_a_batch_and_what_is_empty(monkeypatch, name, L, attends):
    if name == "no heads" and torch_private.release() < (2, 13):
        pytest.skip("in eager torch 2.11, too, attention divides by the number of heads")
    monkeypatch.setattr(table, "attends", lambda device, few: attends)

    def attend(*given):
        return native(*REPEATED[name](*given))

    y, expected, _ = compare(attend, *inputs(L, S))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("L", [1, S])
def test_a_key_written_after_it_was_repeated_is_not_read_again(attends, L):
    y, expected, _ = run(cache_written_after_the_repeat, L)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("given", [{"mask_heads": HEADS * GROUP}, {"heads": HEADS * GROUP}], ids=str)
def test_masks_of_each_head_and_heads_that_share_nothing(attends, given):
    y, expected, graph = compare(native, *inputs(1, S, **given))
    assert "int8fx.attention" in graph
    torch.testing.assert_close(y, expected)


def test_with_amx_torch_attends_to_many_rows(monkeypatch):
    monkeypatch.setattr(cpu, "isa", lambda: "amx_int8")
    assert "int8fx.attention" not in run(repeated)[2]
    assert "int8fx.attention" in run(repeated, L=1)[2]


def test_gradients_of_the_inputs_flow(attends):
    model = Attention(native).requires_grad_(False)
    x, k, v, mask = inputs(S, S)
    x.requires_grad_()
    torch._dynamo.reset()
    torch.compile(model, backend="llmint8", fullgraph=True)(x, k, v, mask).sum().backward()
    assert x.grad.abs().sum() > 0


def passes_of(attend, **sizes):
    """What came of the passes on an attention behind an int8 linear."""
    _, report = compile_once(Attention(attend).requires_grad_(False), *inputs(S=S, **sizes))
    names = ("attend_few_rows", "group_heads", "attend_many_rows")
    return tuple(outcome_of(report, name) for name in names)


REASONS = {
    "neither few": (repeated, {"L": 6}, MORE_ROWS, FEWER_ROWS),
    "nor many": (repeated, {"L": 31}, MORE_ROWS, FEWER_ROWS),
    "dropout": (dropped, {"L": S}, DROPOUT, DROPOUT),
    "autocast": (cast, {"L": 1}, DTYPE, FEWER_ROWS),
}


@pytest.mark.parametrize("name", REASONS)
def test_an_attention_stays_for_a_reason_of_each_pass(attends, name):
    attend, sizes, of_few, of_many = REASONS[name]
    few, _, many = passes_of(attend, **sizes)
    assert (few.changed, few.refused) == (0, {of_few: 1})
    assert (many.changed, many.refused) == (0, {of_many: 1})


def test_rows_that_vary_are_many_and_compiled_once(attends):
    """A guard on their number would compile few rows once more."""
    model = Attention(native).requires_grad_(False)
    torch._dynamo.reset()
    forward = torch.compile(model, backend="llmint8", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for L in (24, 40, 9):
            args = inputs(L, L)
            if L == 24:
                forward(*args)
                graphs = compile_counts()[0]
            quantized = int8fx.quantize_(copy.deepcopy(model))
            torch.testing.assert_close(forward(*args), quantized(*args), rtol=1e-4, atol=1e-4)
    assert compile_counts()[0] == graphs


def test_where_torchs_own_is_as_fast_the_passes_say_so(monkeypatch):
    monkeypatch.setattr(table, "attends", lambda device, few: False)
    few, _, many = passes_of(repeated, L=S)
    assert few.refused == many.refused == {"torch's own is as fast on cpu": 1}


def test_a_gradient_keeps_both_passes_away(attends):
    model = Attention(native).requires_grad_(False)
    x, *others = inputs(S, S)
    (report,) = reports_of(
        lambda: torch.compile(model, backend="llmint8", fullgraph=True)(x.requires_grad_(), *others)
    )
    for name in ("attend_few_rows", "attend_many_rows"):
        assert outcome_of(report, name).skipped == "a gradient may be asked for"


def test_an_attention_of_an_attention(attends):
    """The second reads what took the first one's place."""

    def twice(q, k, v, mask):
        return native(native(q, k, v, mask), k, v, mask)

    for L in (1, S):
        y, expected, graph = compare(twice, *inputs(L, S))
        assert graph.count("int8fx.attention") == 2
        torch.testing.assert_close(y, expected)
