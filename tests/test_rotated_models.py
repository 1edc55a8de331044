"""int8-rotated with static columns, in what models are made of and go through: adapters, Conv1D,
experts, copies, pickles, ahead-of-time compiles."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import int8fx
from int8fx import Int8Weight
from int8fx.kernels.ops.rotated_linear import rotated_linear
from int8fx.kernels.schemes.static_columns import operands
from int8fx.kernels.schemes.table import SCHEMES
from int8fx.testing.support import Mlp, check_adapter_gradients, compile_once

K, N = 64, 96
ROTATED = {"scheme": "int8-rotated"}
each_kind = pytest.mark.parametrize("with_columns", [False, True], ids=["data-free", "calibrated"])


def rows(M: int = 6, width: int = K) -> Tensor:
    """With a column that is large in every row."""
    x = torch.randn(M, width, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 30.0
    return x


def options_for(model: nn.Module, with_columns: bool, *inputs: Tensor) -> dict:
    batch = inputs or (rows(),)
    return ROTATED | ({"calibration": int8fx.calibrate(model, [batch])} if with_columns else {})


def built() -> nn.Module:
    torch.manual_seed(0)
    return Mlp(K, N).requires_grad_(False)


def quantized(with_columns: bool) -> nn.Module:
    model = built()
    return int8fx.quantize_(model, **options_for(model, with_columns))


# --- LoRA -----------------------------------------------------------------------------------------


def adapted(base: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    return peft.get_peft_model(base, config)


@each_kind
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_adapters_get_the_gradients_of_the_dequantised_model(with_columns, compiled):
    check_adapter_gradients(adapted(quantized(with_columns)), rows(), compiled, 0.01)


@each_kind
def test_training_an_adapter_lowers_the_loss_and_leaves_the_base(with_columns):
    model, x = adapted(quantized(with_columns)).train(), rows()
    weight = model.base_model.model.up.base_layer.weight
    before = weight.clone()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x) - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert type(weight) is Int8Weight and torch.equal(weight, before)


@each_kind
def test_an_adapted_model_compiles_for_evaluation_to_what_it_computes(with_columns):
    model, x = adapted(quantized(with_columns)).eval(), rows()
    with torch.no_grad():
        expected = model(x)
    y, report = compile_once(model, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    accepted = [decision.scheme for decision in report.decisions if decision.accepted]
    assert accepted == ["int8-rotated"] * 2  # the adapters' factors stay in float


@each_kind
def test_merging_an_adapter_quantises_the_sum_with_the_same_columns(with_columns):
    base = quantized(with_columns)
    columns = base.up.weight.options["columns"]
    assert len(columns) == (8 if with_columns else 0)
    model, x = adapted(base).eval(), rows()
    with torch.no_grad():
        expected = model(x)
        merged = model.merge_and_unload()
        y = merged(x)
    assert merged.up.weight.options["columns"] == columns
    assert (y - expected).norm() < (0.01 if with_columns else 0.03) * expected.norm()


# --- Conv1D ---------------------------------------------------------------------------------------


@each_kind
def test_conv1d_is_the_linear_of_its_transpose(with_columns, tmp_path):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, x = nn.Sequential(Conv1D(N, K)).requires_grad_(False), rows()
    linear = nn.Linear(K, N).requires_grad_(False)
    linear.weight.copy_(conv[0].weight.t())
    linear.bias.copy_(conv[0].bias)
    options = options_for(conv, with_columns)
    y, report = compile_once(copy.deepcopy(conv), x, backend_options=options)
    assert [decision.scheme for decision in report.decisions] == ["int8-rotated"]
    expected, _ = compile_once(linear, x, backend_options=options_for(linear, with_columns))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    other = copy.deepcopy(conv)
    nn.init.zeros_(other[0].weight)
    for each in (conv, other):
        int8fx.quantize_(each, **options)
    assert conv[0].weight.shape == (K, N) and conv[0].weight.transposed
    torch.testing.assert_close(conv(x), y, rtol=1e-6, atol=1e-6)
    int8fx.save_checkpoint(conv, tmp_path)
    assert torch.equal(int8fx.load_checkpoint(other, tmp_path)(x), conv(x))


# --- experts --------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A matrix for each row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, N, K) / K**0.5, requires_grad=False)

    def forward(self, x, experts):
        return torch.bmm(self.weight[experts], x.unsqueeze(-1)).squeeze(-1)


@each_kind
def test_rows_of_experts_are_those_of_the_linear_with_their_matrix(with_columns):
    model, x, experts = Experts(), rows(9), torch.tensor([3, 0, 0, 1, 3, 0, 1, 3, 2])
    options = options_for(model, with_columns, x, experts)
    y, report = compile_once(model, x, experts, backend_options=options)
    (decision,) = report.decisions
    assert decision.accepted and decision.scheme == "int8-rotated" and decision.experts == 4
    columns = ()
    if with_columns:
        columns = options["calibration"].columns_of("weight", (N, K), 8)
        assert len(columns) == 8 and 5 in columns
    choice = SCHEMES["int8-rotated"].choice(columns=columns)
    for row, expert in enumerate(experts.tolist()):
        parts = operands(choice.quantize(model.weight[expert]))
        expected = rotated_linear(x[row : row + 1], 0.0, 64, "hadamard", *parts, None)
        assert torch.equal(y[row : row + 1], expected)
    exact = model(x, experts)
    assert (y - exact).norm() < 0.01 * exact.norm()


@each_kind
def test_a_block_of_mixtral(with_columns):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(0)
    sizes = {"hidden_size": K, "intermediate_size": N, "num_experts_per_tok": 2}
    config = MixtralConfig(num_local_experts=4, **sizes)
    config._experts_implementation = "grouped_mm"
    block = MixtralSparseMoeBlock(config).bfloat16()
    for parameter in block.parameters():
        parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5)
    block = block.requires_grad_(False).eval()
    x = rows(20).unsqueeze(0).bfloat16()
    options = options_for(block, with_columns, x)
    y, report = compile_once(block, x, backend_options=options)
    schemes = {decision.experts: decision.scheme for decision in report.decisions if decision.accepted}
    assert schemes == {4: "int8-rotated"}
    y, exact = (each[0] if isinstance(each, tuple) else each for each in (y, block(x)))
    assert (y - exact).norm() < 0.02 * exact.norm()


# --- copies, pickles, ahead of time ---------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_keep_the_columns(copied):
    model, x = quantized(True), rows()
    twin = copied(model)
    assert twin.up.weight.options == model.up.weight.options
    assert torch.equal(twin.up.weight, model.up.weight) and torch.equal(twin(x), model(x))
    pairs = zip(model.up.weight.tensors, twin.up.weight.tensors, strict=True)
    assert all(left.data_ptr() != right.data_ptr() for left, right in pairs)
    assert torch.equal(compile_once(twin, x)[0], compile_once(model, x)[0])


def test_a_state_dict_with_columns_comes_back_into_another_process(tmp_path):
    model = quantized(True)
    torch.save(model.up.weight, tmp_path / "weight.pt")
    torch.save(torch.nn.functional.linear(rows(), model.up.weight), tmp_path / "y.pt")
    code = f"""
import torch, int8fx
weight = torch.load({str(tmp_path / "weight.pt")!r}, weights_only=True)
x = torch.randn(6, {K}, generator=torch.Generator().manual_seed(1))
x[:, 5] *= 30.0
y = torch.nn.functional.linear(x, weight)
assert torch.equal(y, torch.load({str(tmp_path / "y.pt")!r}))
print(len(weight.options["columns"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "8\n", done.stderr


@each_kind
def test_a_model_is_exported_and_compiled_ahead_of_time(with_columns, tmp_path):
    model, x = quantized(with_columns), rows()
    dim = torch.export.Dim("rows", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: dim},))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "m.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for M in (3, 6):
        torch.testing.assert_close(loaded(x[:M]), model(x[:M]), rtol=1e-6, atol=1e-6)
