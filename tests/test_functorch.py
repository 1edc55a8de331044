"""torch.func, forward-mode AD and nested tensors: right or refused, and no level stays entered."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves

import int8fx
from int8fx import torch_private
from int8fx.testing.support import assert_close_to_float64

K, N = 32, 24


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 16)).requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1))


def vjp_of(model, x):
    y, pull = vjp(model, x)
    return y, pull(y)


TRANSFORMS = {
    "vmap": (lambda m, x: vmap(m)(x), "vmap"),
    "vmap of vmap": (lambda m, x: vmap(vmap(m))(x[None]), "vmap of vmap"),
    "grad": (lambda m, x: grad(lambda x: m(x).square().sum())(x), "grad"),
    "vmap of grad": (lambda m, x: vmap(grad(lambda r: m(r).square().sum()))(x), "vmap of grad"),
    "vjp": (vjp_of, "grad"),
    "jvp": (lambda m, x: jvp(m, (x,), (x.cos(),)), "jvp"),
    "jacrev": (lambda m, x: jacrev(m)(x[0]), "grad"),
    "jacfwd": (lambda m, x: jacfwd(m)(x[0]), "vmap of jvp"),
    "hessian": (lambda m, x: hessian(lambda r: m(r).square().sum())(x[0]), "vmap of jvp of grad"),
    "vmap of what it does not map": (lambda m, x: vmap(lambda r: r + m(x))(x.sum(1)), "vmap"),
}


def compiled(function, *args, **options):
    torch._dynamo.reset()
    with int8fx.collect_reports() as reports:
        y = torch.compile(function, backend="llmint8", fullgraph=True, options=options or None)(*args)
    return y, [decision for report in reports for decision in report.decisions]


def assert_same(y, expected):
    for left, right in zip(tree_leaves(y), tree_leaves(expected), strict=True):
        torch.testing.assert_close(left, right)


def no_level_is_entered() -> bool:
    functorch = torch._C._functorch
    hooks_work = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None
    outside = functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0
    return outside and hooks_work and not functorch.get_inplace_requires_grad_allowed()


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_linear_inside_a_transform_stays_in_float_with_the_reason(transform, attention, model, x):
    function, reason = TRANSFORMS[transform]
    y, decisions = compiled(lambda x: function(model, x), x, attention=attention)
    assert_same(y, function(model, x))
    assert [decision.reason for decision in decisions] == [f"inside torch.func: {reason}"] * 2
    assert [decision.path for decision in decisions] == ["0", "2"]
    assert no_level_is_entered()


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_an_int8_model_inside_a_transform_computes_what_it_does_eagerly(transform, model, x):
    function, _ = TRANSFORMS[transform]
    int8fx.quantize_(model)
    y, decisions = compiled(lambda x: function(model, x), x)
    assert_same(y, function(model, x))
    assert all("inside torch.func" in decision.reason for decision in decisions)


# The rest make a basis in place, which may share memory with whatever their gradients are taken of.
@pytest.mark.parametrize("transform", ["vmap", "vmap of vmap", "grad", "vmap of grad", "vjp", "jvp"])
def test_a_weight_that_a_transform_reads_is_int8_outside_of_it(transform, model, x):
    function, reason = TRANSFORMS[transform]
    y, decisions = compiled(lambda x: (model[0](x), function(model, x)), x)
    assert_same(y[1], function(model, x))
    assert_close_to_float64(y[0], model[0](x).double(), K)
    inside = f"inside torch.func: {reason}"
    assert [decision.reason for decision in decisions] == ["", inside, inside]


def test_linears_before_and_after_a_transform_are_rewritten(model, x):
    first, last = model[0], model[2]

    def function(x):
        return last(vmap(torch.tanh)(first(x)))

    y, decisions = compiled(function, x)
    assert [decision.accepted for decision in decisions] == [True, True]
    assert_close_to_float64(y, function(x).double(), K)


def test_attention_inside_a_transform_stays_as_it_is(x):
    """Operators of ours would have no rule for its levels."""
    linear = nn.Linear(K, K).requires_grad_(False)

    def function(x):
        q = linear(x).view(2, 2, 32, 16)
        attend = nn.functional.scaled_dot_product_attention
        return vmap(lambda q: attend(q[None], q[None], q[None]))(q)

    x = torch.randn(64, K)
    y, decisions = compiled(function, x)
    assert [decision.accepted for decision in decisions] == [True]
    assert_close_to_float64(y, function(x).double(), K)


def test_other_weights_by_functional_call(model, x):
    others = {name: torch.randn_like(each) for name, each in model.named_parameters()}

    def function(x, others):
        return functional_call(model, others, (x,))

    y, decisions = compiled(function, x, others)
    assert_same(y, function(x, others))
    assert not any(decision.accepted for decision in decisions)


def test_an_ensemble_by_stack_module_state(model, x):
    models = [copy.deepcopy(model) for _ in range(3)]
    for index, each in enumerate(models):
        nn.init.normal_(each[0].weight, std=0.1 * (index + 1))
    parameters, buffers = stack_module_state(models)

    def function(parameters, buffers, x):
        def member(parameters, buffers):
            return functional_call(model, (parameters, buffers), (x,))

        return vmap(member)(parameters, buffers)

    y, decisions = compiled(function, parameters, buffers, x)
    assert_same(y, torch.stack([each(x) for each in models]))
    assert not any(decision.accepted for decision in decisions)


# --- transforms around what was compiled ------------------------------------------------------------


def test_a_jacobian_around_a_compiled_model_is_that_of_int8(model, x):
    torch._dynamo.reset()
    run = torch.compile(model[0], backend="llmint8", fullgraph=True)
    jacobian = torch.autograd.functional.jacobian(run, x[0])
    weight = model[0].weight
    # Straight through the rounding of x: half a step of each channel is left.
    assert ((jacobian - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.501).all()
    assert not torch.equal(jacobian, weight)


@pytest.mark.parametrize("grad_mode", [False, True])
def test_a_tangent_is_not_dropped_in_silence(grad_mode, model, x):
    torch._dynamo.reset()
    run = torch.compile(model, backend="llmint8", fullgraph=True)
    with torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
        # torch 2.14 refuses it before a backend is asked.
        refused = r"forward-mode AD.*(torch\.func\.jvp inside|silently drop the tangent)"
        with pytest.raises(RuntimeError, match=refused):
            run(forward_ad.make_dual(x, x.cos()))
        assert_close_to_float64(run(x), model(x).double(), K)  # nothing is dual
    assert_close_to_float64(run(x), model(x).double(), K)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_around_a_compiled_model(transform, model, x):
    function, _ = TRANSFORMS[transform]
    torch._dynamo.reset()
    run = torch.compile(model, backend="llmint8")
    y, expected = function(run, x), function(model, x)
    for left, right in zip(tree_leaves(y), tree_leaves(expected), strict=True):
        assert (left - right).norm() / right.norm() < 0.05
    assert no_level_is_entered()


# --- failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_failed_compile_leaves_no_level_entered(transform, model, x, monkeypatch):
    function, _ = TRANSFORMS[transform]
    expected = function(model, x)
    compile_fx = torch_private.compile_with_inductor

    def fails_inside_the_first_level(gm, inputs, *rest):
        node = next(each for each in gm.graph.nodes if each.target is nn.functional.linear)
        with gm.graph.inserting_before(node):
            gm.graph.call_function(raise_out_of_luck)
        gm.recompile()
        return compile_fx(gm, inputs, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch_private, "compile_with_inductor", fails_inside_the_first_level)
        with pytest.raises(Exception, match="out of luck"):
            compiled(lambda x: function(model, x), x)
    assert no_level_is_entered()
    assert_same(function(model, x), expected)
    y, _ = compiled(lambda x: function(model, x), x)
    assert_same(y, expected)


def raise_out_of_luck():
    raise RuntimeError("out of luck")


# --- nested tensors ---------------------------------------------------------------------------------


@pytest.fixture
def nested():
    torch.manual_seed(2)
    parts = [torch.randn(3, K), torch.randn(5, K), torch.randn(1, K)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_jagged_tensor_stays_in_float_with_the_reason(quantised, model, nested):
    if quantised:
        int8fx.quantize_(model)
    y, decisions = compiled(model, nested)
    torch.testing.assert_close(y.values(), model(nested).values())
    assert [decision.reason for decision in decisions] == ["the input is a nested tensor"] * 2


def test_the_values_of_a_jagged_tensor_are_rewritten(model, nested):
    y, decisions = compiled(lambda nested: model(nested.values()), nested)
    assert [decision.accepted for decision in decisions] == [True, True]
    assert_close_to_float64(y, model(nested.values()).double(), K)


@pytest.mark.parametrize("kind", ["strided nested", "sparse", "csr"])
def test_other_layouts_are_what_they_are_eagerly(kind, model, x):
    layouts = {
        "strided nested": lambda: torch.nested.nested_tensor([x[:2], x[2:]]),
        "sparse": lambda: torch.eye(K).to_sparse(),
        "csr": lambda: torch.eye(K).to_sparse_csr(),
    }
    given = layouts[kind]()
    torch._dynamo.reset()
    y, expected = torch.compile(model[0], backend="llmint8")(given), model[0](given)
    for left, right in zip(y.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(left, right)


def test_complex_numbers_stay_as_they_are():
    linear = nn.Linear(K, N, dtype=torch.complex64).requires_grad_(False)
    x = torch.randn(3, K, dtype=torch.complex64)
    y, decisions = compiled(linear, x)
    torch.testing.assert_close(y, linear(x))
    assert "weight of torch.complex64" in decisions[0].reason
