"""However a weight changes, the next call computes with it: every way to change one times every kind.

What torch cannot know and no sample shows, a few elements of a large weight, is in test_refresh.py.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn

import int8fx
from int8fx.testing.installed import install, run
from int8fx.testing.support import Mlp, assert_close_to_float64, interpreted
from int8fx.testing.weight_changes import CHANGES, STEPS, UNCOUNTED, ThroughNumpy
from int8fx.torch_private import StorageReference
from int8fx.weights.store import STORE

K, N, E, M = 64, 96, 4, 8


@dataclass(frozen=True)
class Kind:
    """A kind of weight: what is computed with it, and how it is made."""

    function: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...] = (N, K)
    dtype: torch.dtype = torch.float32
    made: Callable[[Tensor], Tensor] = lambda weight: weight
    writes: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    rounded: bool = False  # to bf16 on the way


def tied(x, w):
    return (
        F.linear(x, w)[:, :K] + F.linear(2 * x, w)[:, K - N :].sum(-1, True) + F.pad(x, (0, N - K)) @ w
    )


def in_bfloat16(x, w):
    if x.dtype is torch.float64:
        return F.linear(x, w)
    return F.linear(x.to(torch.bfloat16), w.to(torch.bfloat16)).to(x.dtype)


def routed(x, w):
    experts = torch.arange(M, device=x.device) % E
    return torch.bmm(w[experts], x.unsqueeze(-1)).squeeze(-1)


def in_a_buffer(weight):
    flat = torch.randn(100 + 2 * weight.numel()).to(weight.dtype)
    part = flat[100 : 100 + weight.numel()].view(weight.shape)
    return part.copy_(weight)


def with_gaps(weight):
    return torch.randn(weight.shape[0], 2 * weight.shape[1])[:, ::2].copy_(weight)


KINDS = {
    "float": Kind(F.linear),
    "bfloat16": Kind(F.linear, dtype=torch.bfloat16, rounded=True),
    "float16": Kind(F.linear, dtype=torch.float16, rounded=True),
    "tied": Kind(tied),
    "slice": Kind(lambda x, w: F.linear(x, w[16:80])),
    "transposed": Kind(lambda x, w: x @ w, shape=(K, N)),
    "cast": Kind(in_bfloat16, rounded=True),
    "experts": Kind(routed, shape=(E, N, K)),
    "small": Kind(F.linear, shape=(16, K)),
    "part of a buffer": Kind(F.linear, made=in_a_buffer),
    "laid out transposed": Kind(F.linear, made=lambda weight: weight.t().contiguous().t()),
    "with gaps": Kind(F.linear, made=with_gaps),
    "inference": Kind(F.linear, made=lambda weight: weight.clone(), writes=torch.inference_mode),
}


class Model(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(kind.made(torch.randn(kind.shape).to(kind.dtype)))

    def forward(self, x):
        return self.kind.function(x, self.weight)


def expected(model, x):
    with torch.no_grad():
        return model.kind.function(x.double(), model.weight.double())


def changed(model, x, change, call):
    """Changes a weight, by so much that the old one would be far outside of any bound."""
    before = expected(model, x)
    with model.kind.writes():
        change(model, call)
    assert (expected(model, x) - before).norm() > 0.5 * before.norm()


@pytest.fixture(scope="module", params=KINDS)
def compiled(request):
    """A model of a kind of weight, and compiled; the tests put a new weight in."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    kind = KINDS[request.param]
    with kind.writes():
        model = Model(kind)
    return model, interpreted(model)


# A tensor of inference mode cannot be given a gradient.
TRAINS = (STEPS.keys() | {"Adam"}) - {"fused Adam of another parameter"}
HALF = KINDS["bfloat16"], KINDS["float16"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_the_next_call(compiled, change):
    model, call = compiled
    kind = model.kind
    if kind is KINDS["inference"] and change in TRAINS:
        pytest.skip("an inference tensor cannot be trained")
    if kind is KINDS["laid out transposed"] and change == "vector_to_parameters":
        pytest.skip("torch refuses to view it")
    if kind in HALF and change == "fused SGD":
        pytest.skip("on a CPU it changes nothing in 16 bits (torch 2.13)")
    torch.manual_seed(1)
    x = torch.randn(M, K).to(kind.dtype)
    with kind.writes():
        model.weight = Model(kind).weight
        with int8fx.collect_reports() as reports:
            call(x)
    assert all(report.accepted for report in reports)
    changed(model, x, CHANGES[change], lambda: call(x))
    for _ in range(2):
        assert_close_to_float64(call(x), expected(model, x), K)


def test_through_inductor_a_change_is_seen_at_the_next_call():
    """One compiled model goes through all changes, one after the other."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, x = Model(KINDS["float"]), torch.randn(M, K)
    call = torch.no_grad()(torch.compile(model, backend="llmint8", fullgraph=True, dynamic=False))
    for change in CHANGES.values():
        model.weight = Model(KINDS["float"]).weight
        assert_close_to_float64(call(x), expected(model, x), K)
        changed(model, x, change, lambda: call(x))
        assert_close_to_float64(call(x), expected(model, x), K)


@pytest.mark.parametrize("change", CHANGES)
def test_without_the_check_what_only_the_content_tells_waits_for_a_refresh(change):
    """And so it is on a GPU, whose memory is not read."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, x = Model(KINDS["float"]), torch.randn(M, K)
    call = interpreted(model, check_weights=False)
    call(x)
    changed(model, x, CHANGES[change], lambda: call(x))
    if change in UNCOUNTED:
        stale = call(x)
        assert (stale.double() - expected(model, x)).norm() > 0.5 * stale.norm()
        int8fx.refresh(model)
    assert_close_to_float64(call(x), expected(model, x), K)


# --- weights in int8 ------------------------------------------------------------------------------

# What an int8 weight takes, by quantising it; the rest is refused.
TAKEN = {
    *("load_state_dict", "another parameter", "data =", "data = there and back", "data = of a bank"),
    *("data = with other strides", "vector_to_parameters", "without an optimizer", "data +="),
    "data.copy_",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("released", [False, True], ids=["int8", "released"])
def test_a_change_of_an_int8_weight_is_seen_or_refused(released, change):
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, x = nn.Linear(K, N, bias=False).requires_grad_(False), torch.randn(M, K)
    if not released:
        int8fx.quantize_(model)
    call = interpreted(model, release_weights=released)
    y = call(x)
    if change in ({"load_state_dict"} if released else TAKEN):
        CHANGES[change](model, lambda: call(x))
        after = call(x)
        assert not torch.equal(after, y)
        int8fx.quantize_(model)  # a released one may be read then
        assert torch.equal(after, model(x))
    else:
        with pytest.raises(
            RuntimeError, match=r"read-only|require grad|was released|no float values in memory"
        ):
            CHANGES[change](model, lambda: call(x))
        assert torch.equal(call(x), y)


def test_what_is_written_to_the_parts_of_an_int8_weight_is_seen():
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, x = int8fx.quantize_(nn.Linear(K, N)), torch.randn(M, K)
    other = int8fx.quantize_(nn.Linear(K, N)).weight
    call = interpreted(model)
    before = call(x)
    model.weight.packed.copy_(other.packed)
    once = call(x)
    model.weight.w_scale.data.mul_(2)
    assert torch.equal(call(x), model(x))
    assert not torch.equal(once, before) and not torch.equal(call(x), once)


# --- another process ------------------------------------------------------------------------------


def _negate(*weights):
    for weight in weights:
        weight.data.neg_()


def test_what_another_process_writes_to_shared_memory_is_seen():
    torch._dynamo.reset()
    torch.manual_seed(1)
    kinds = [KINDS[name] for name in ("float", "bfloat16", "experts", "transposed")]
    models = [Model(kind).share_memory() for kind in kinds]
    calls, x = [interpreted(model) for model in models], torch.randn(M, K)
    before = [call(x.to(kind.dtype)) for call, kind in zip(calls, kinds, strict=True)]
    worker = multiprocessing.get_context("spawn").Process(
        target=_negate, args=[model.weight.detach() for model in models]
    )
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    for call, kind, y in zip(calls, kinds, before, strict=True):
        assert torch.equal(call(x.to(kind.dtype)), -y)


# --- what was packed of the old one ---------------------------------------------------------------


def alive(weight, storages):
    """How many packed copies of a weight have memory; ``storages`` are of those so far."""
    (form,) = STORE.forms(weight)
    storages.append(StorageReference(form.tensors[0]))
    return sum(not storage.expired for storage in storages)


@pytest.mark.parametrize("inductor", [False, True], ids=["interpreted", "inductor"])
@pytest.mark.parametrize("change", ["mul_", "fused Adam", "data.mul_"])
def test_of_a_weight_that_changes_one_packed_copy_is_alive(change, inductor):
    """One model has a graph for each of eight shapes, and its weight changes before every call."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = Model(KINDS["float"])
    if inductor:
        call = torch.no_grad()(torch.compile(model, backend="llmint8", dynamic=False))
    else:
        call = interpreted(model)
    storages, shapes = [], range(1, 4 if inductor else 9)
    for _ in range(2):
        for rows in shapes:
            CHANGES[change](model, lambda: None)
            x = torch.randn(rows, K)
            assert_close_to_float64(call(x), expected(model, x), K)
            assert alive(model.weight, storages) == 1
    assert len({storage.id for storage in storages}) > 1


def test_all_forms_of_a_weight_go_when_it_has_changed():
    torch._dynamo.reset()
    model, x = Model(KINDS["tied"]), torch.randn(M, K)
    interpreted(model)(x)
    storages = [StorageReference(form.tensors[0]) for form in STORE.forms(model.weight)]
    assert len(storages) == 2
    STORE.changed([model.weight])
    assert all(storage.expired for storage in storages) and not STORE.forms(model.weight)


# --- who tells of changes -------------------------------------------------------------------------


def forms(*weights):
    return [STORE.forms(weight)[0] for weight in weights]


def test_a_step_leaves_what_was_packed_of_other_weights():
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, x = Mlp(K, N), torch.randn(M, K)
    model.down.requires_grad_(False)
    call = interpreted(model)
    call(x)
    up, down = forms(model.up.weight, model.down.weight)
    model(x).sum().backward()
    torch.optim.Adam(model.parameters(), fused=True).step()
    assert not STORE.forms(model.up.weight)
    call(x)
    assert STORE.forms(model.down.weight) == [down] and STORE.forms(model.up.weight) != [up]


def test_an_optimizer_without_gradients_trains_frozen_weights():
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, x = Model(KINDS["float"]).requires_grad_(False), torch.randn(M, K)
    call = interpreted(model, check_weights=False)
    call(x)
    ThroughNumpy([model.weight]).step()
    assert_close_to_float64(call(x), expected(model, x), K)
    # Beside what is trained it is left as it is.
    (form,) = STORE.forms(model.weight)
    torch.optim.SGD([nn.Parameter(torch.ones(2)), model.weight]).step()
    assert STORE.forms(model.weight) == [form]


class Sharded(nn.Parameter):
    """Stands for a ``DTensor``: what is trained is not the memory that a graph is given."""


def test_a_step_of_parameters_of_another_kind_is_one_of_all_that_are_trained():
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, x = Mlp(K, N), torch.randn(M, K)
    model.down.requires_grad_(False)
    interpreted(model)(x)
    sharded = Sharded(torch.randn(3))
    sharded.grad = torch.ones(3)
    torch.optim.Adam([sharded], fused=True).step()
    assert not STORE.forms(model.up.weight) and STORE.forms(model.down.weight)


def test_a_weight_without_its_memory_is_refused():
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, x = Model(KINDS["float"]), torch.randn(M, K)
    call = interpreted(model)
    y = call(x)
    kept = model.weight.data.clone()
    model.weight.untyped_storage().resize_(0)
    with pytest.raises(
        RuntimeError, match=r"shape \[96, 64\].*its storage was resized, and has 0 bytes"
    ):
        call(x)
    model.weight.untyped_storage().resize_(kept.nbytes)
    model.weight.data.copy_(kept)
    assert torch.equal(call(x), y)


def test_an_adapter_that_was_trained_is_the_one_that_is_evaluated():
    """Evaluated under no_grad it is quantised, and a fused optimizer's step writes to it unseen."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=16, target_modules=["up", "down"], init_lora_weights=False)
    model, x = peft.get_peft_model(Mlp(K, N), config), torch.randn(M, K)
    call = interpreted(model, only=["*"], check_weights=False)
    call(x)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=0.3, fused=True)
    for _ in range(2):
        model(x).pow(2).sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert_close_to_float64(call(x), copy.deepcopy(model).double()(x.double()), K)


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "IA3Config"])
def test_a_merge_into_a_float_base_is_seen_without_reading_its_content(kind):
    torch._dynamo.reset()
    torch.manual_seed(1)
    peft = pytest.importorskip("peft")
    options = {"feedforward_modules": []} if kind == "IA3Config" else {"r": 4}
    name = "init_ia3_weights" if kind == "IA3Config" else "init_weights"
    name = "init_lora_weights" if kind == "LoraConfig" else name
    config = getattr(peft, kind)(target_modules=["up", "down"], **options, **{name: False})
    model, x = peft.get_peft_model(Mlp(K, N), config).eval(), torch.randn(M, K)
    call = interpreted(model, check_weights=False)

    def check():
        with torch.no_grad():
            expected = copy.deepcopy(model).double()(x.double())
            assert_close_to_float64(call(x), expected, K)
        return expected

    apart = check()
    base = model.base_model.model.up.get_base_layer().weight
    for change in (model.merge_adapter, model.unmerge_adapter, model.merge_adapter):
        before = base.clone()
        change()
        assert not torch.equal(base, before)
        assert not STORE.forms(base)
        torch.testing.assert_close(check(), apart, rtol=1e-4, atol=1e-4)


IMPORTED_LATER = """
import copy, sys, torch
from torch import nn
import int8fx
torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(64, 96)).requires_grad_(False), torch.randn(8, 64)
compiled = torch.compile(model, backend="llmint8", options={"check_weights": False})
with torch.no_grad():
    compiled(x)
    assert "peft" not in sys.modules
    import peft

    class Own(peft.tuners.lora.layer.LoraLayer):
        def merge(self):
            self.base_layer.weight.data.mul_(-3)

    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["0"], init_lora_weights=False)
    changes = (
        lambda: peft.get_peft_model(model, config).merge_and_unload(),
        lambda: Own(model[0]).merge(),
    )
    for change in changes:
        change()
        expected = copy.deepcopy(model).double()(x.double())
        error = (compiled(x).double() - expected).norm() / expected.norm()
        assert error < 0.02, error
"""


def test_merges_are_seen_where_peft_is_imported_after_the_compile(tmp_path):
    """And those of kinds that are defined later still; no float weight has another graph then."""
    pytest.importorskip("peft")
    done = run(IMPORTED_LATER, install(tmp_path))
    assert done.returncode == 0, done.stderr
