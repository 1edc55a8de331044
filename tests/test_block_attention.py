"""The attention of many rows: against float64 on every instruction set, and where the pass puts it."""

import math

import pytest
import torch
import torch.nn.functional as F
from attentions import Attention, causal, compare, inputs, native, repeat, repeated
from bounds import attention_bound
from hypothesis import given, settings
from hypothesis import strategies as st

from int8fx.kernels import table
from int8fx.kernels.attention import attention, attention_reference
from int8fx.kernels.cpu import int8_linear as cpu

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


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (2, 3, 3, 230, 200, 70, 70))),
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


def test_a_nan_stays_in_its_row():
    q, k, v = (torch.randn(1, 1, 60, 16) for _ in range(3))
    q[0, 0, 7, 3] = math.nan
    y = attention(q, k, v, None, False, 0.25)
    assert y[0, 0, 7].isnan().all()
    assert y.isnan().sum() == 16


def test_large_scores_do_not_overflow():
    q = torch.full((1, 1, 40, 16), 100.0)
    k, v = q.clone(), torch.randn(1, 1, 40, 16)
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


def cast(q, k, v, mask):
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), mask)


def run(attend, L=S, dtype=torch.float32):
    return compare(attend, *inputs(L, S, dtype=dtype))


@pytest.fixture
def attends(monkeypatch):
    """As on a machine without AMX."""
    monkeypatch.setattr(table, "attends", lambda device: True)


@pytest.mark.parametrize("attend", [repeated, native, causal], ids=lambda attend: attend.__name__)
def test_an_attention_of_many_rows_is_replaced(attends, attend):
    y, expected, graph = run(attend)
    assert "int8fx.attention" in graph
    assert "expand" not in graph
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("attend", "given"),
    [(repeated, {"L": 31}), (dropped, {}), (cast, {}), (repeated, {"dtype": torch.float64})],
    ids=["few rows", "dropout", "autocast", "float64"],
)
def test_other_attentions_are_left_alone(attends, attend, given):
    y, expected, graph = run(attend, **given)
    assert "int8fx.attention" not in graph
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_with_amx_torch_attends(monkeypatch):
    monkeypatch.setattr(table, "attends", lambda device: False)
    assert "int8fx.attention" not in run(repeated)[2]


def test_gradients_of_the_inputs_flow(attends):
    model = Attention(native).requires_grad_(False)
    x, k, v, mask = inputs(S, S)
    x.requires_grad_()
    torch._dynamo.reset()
    torch.compile(model, backend="llmint8", fullgraph=True)(x, k, v, mask).sum().backward()
    assert x.grad.abs().sum() > 0
