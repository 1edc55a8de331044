"""release_weights: the compile leaves int8 weights in the modules, and nothing of the float ones."""

import copy
import pickle
import re
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import int8fx
from int8fx import Int8Weight
from int8fx.errors import CheckpointError, ReleasedWeightError
from int8fx.options import Options
from int8fx.testing.support import Mlp, compile_once

K, N = 32, 48
RELEASE = {"release_weights": True}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mlp(K, N).requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1))


def test_the_float_weights_are_gone_and_it_is_compiled_once(model, x):
    torch._dynamo.reset()
    expected, _ = compile_once(copy.deepcopy(model), x)
    gone = [weakref.ref(model.up.weight), weakref.ref(model.down.weight)]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("llmint8")

    def backend(gm, inputs):
        counter.frame_count += 1
        return int8fx.llmint8(gm, inputs, options=RELEASE)

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    for _ in range(3):
        assert torch.equal(compiled(x), expected)
    assert counter.frame_count == 1
    assert all(reference() is None for reference in gone)
    assert type(model.up.weight) is Int8Weight and type(model.down.weight) is Int8Weight
    # Another shape is another graph, of the weights that are there now.
    assert torch.equal(compiled(x[:3]), expected[:3])
    assert counter.frame_count == 2


def released(model, x):
    """The compiled model, and its output."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="llmint8", options=RELEASE, fullgraph=True, dynamic=False)
    return compiled, compiled(x)


WAYS_BACK = r"int8fx\.quantize_\(model\).*int8fx\.dequantize_\(model\)"
READERS = {
    "an eager call": lambda model, x: model(x),
    "state_dict": lambda model, x: model.state_dict(),
    "save_checkpoint": lambda model, x: int8fx.save_checkpoint(model, "nowhere"),
    "to another dtype": lambda model, x: model.to(torch.float64),
    "half": lambda model, x: model.half(),
    "to meta": lambda model, x: model.to("meta"),
    "deepcopy": lambda model, x: copy.deepcopy(model),
    "pickle": lambda model, x: pickle.dumps(model),
    "a sum": lambda model, x: model.up.weight.sum(),
    "a row": lambda model, x: model.up.weight[0],
    "a product with a view": lambda model, x: x @ model.up.weight.detach().t(),
    "a copy": lambda model, x: torch.empty(N, K).copy_(model.up.weight),
    "a write to a part": lambda model, x: model.up.weight[0].zero_(),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_reads_a_released_weight_is_told_and_the_model_is_as_it_was(model, x, reader):
    compiled, y = released(model, x)
    before = {name: (p.dtype, p.device) for name, p in model.named_parameters()}
    for _ in range(2):
        with pytest.raises(ReleasedWeightError, match=rf"was released.*{WAYS_BACK}"):
            READERS[reader](model, x)
    assert {name: (p.dtype, p.device) for name, p in model.named_parameters()} == before
    assert torch.equal(compiled(x), y)


def test_the_error_names_the_weight_where_a_name_is_known(model, x):
    compile_once(model, x, backend_options=RELEASE)
    for reads in (model.state_dict, model.double):
        with pytest.raises(ReleasedWeightError, match=r"^up.weight was released"):
            reads()


def test_what_reads_no_values_goes_on(model, x):
    compile_once(model, x, backend_options=RELEASE)
    weight = model.up.weight
    assert weight.shape == (N, K) and weight.dtype == torch.float32 and weight.device.type == "cpu"
    assert weight.element_size() < 4 and "Int8Weight(shape=[48, 32]" in repr(weight)
    assert "Mlp" in repr(model.eval().requires_grad_(False))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager", "eager"])
def test_another_backend_is_told(model, x, backend):
    compile_once(model, x, backend_options=RELEASE)
    torch._dynamo.reset()
    other = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match=rf"was released.*{WAYS_BACK}"):
        other(x)


def test_quantize_is_the_way_to_a_model_that_everything_reads(model, x):
    quantized = int8fx.quantize_(copy.deepcopy(model))
    compiled, y = released(model, x)
    int8fx.quantize_(model)
    assert torch.equal(model(x), quantized(x)) and torch.equal(model(x), y)
    assert torch.equal(compiled(x), y)
    for name, tensor in quantized.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert torch.equal(copy.deepcopy(model)(x), y) and torch.equal(
        pickle.loads(pickle.dumps(model))(x), y
    )
    assert model.half().up.weight.dtype == torch.float16
    assert type(int8fx.dequantize_(model).up.weight) is nn.Parameter


def test_the_log_says_what_happened_and_the_ways_back(model, x, caplog):
    with caplog.at_level("INFO", "int8fx.compiler.release"):
        compile_once(model, x, backend_options=RELEASE)
    (record,) = [record for record in caplog.records if record.name == "int8fx.compiler.release"]
    assert "2 weights are in int8 now, for what was compiled alone" in record.getMessage()
    assert re.search(WAYS_BACK, record.getMessage())


def test_dequantize_is_the_way_back_to_what_a_released_weight_stands_for(model, x):
    expected = int8fx.dequantize_(int8fx.quantize_(copy.deepcopy(model)))
    compile_once(model, x, backend_options=RELEASE)
    int8fx.dequantize_(model)
    assert type(model.up.weight) is nn.Parameter
    assert torch.equal(model.up.weight, expected.up.weight)
    assert model.double().up.weight.dtype == torch.float64
    model.requires_grad_(True)(x.double()).sum().backward()
    assert model.up.weight.grad is not None


def test_what_is_loaded_into_a_released_weight_is_seen_by_the_compiled_model(model, x):
    floats = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    double = copy.deepcopy(model)
    double.load_state_dict(floats)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="llmint8", options=RELEASE, dynamic=False)
    y = compiled(x)
    assert torch.equal(compiled(x), y) and type(model.up.weight) is Int8Weight
    model.load_state_dict(floats)
    assert model.up.weight.released
    assert torch.equal(compiled(x), int8fx.quantize_(double)(x)) and not torch.equal(compiled(x), y)
    int8fx.dequantize_(model)
    assert torch.equal(model.up.weight, double.up.weight.dequantize())


def test_a_mismatched_checkpoint_leaves_a_released_model_as_it_was(model, x):
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    compiled, y = released(model, x)
    # The last of the model's entries: by then, without a check of all, the others are loaded.
    state["down.weight"] = state["down.weight"][:-1]
    message = r"down.weight: shape \[31, 48\] in the checkpoint, \[32, 48\] in the model"
    with pytest.raises(CheckpointError, match=message):
        model.load_state_dict(state)
    assert torch.equal(compiled(x), y)


def test_what_would_write_to_or_train_a_released_weight_is_told_the_way_back(model, x):
    compile_once(model, x, backend_options=RELEASE)
    with pytest.raises(ReleasedWeightError, match=WAYS_BACK):
        nn.init.normal_(model.up.weight)
    with pytest.raises(RuntimeError, match=r"cannot require grad.*int8fx.dequantize_\(model\)"):
        model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"no part of it can be set: int8fx.dequantize_\(model\)"):
        model.up.weight[0] = 0


def test_conv1d_is_released_in_its_own_shape(x):
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(N, K).requires_grad_(False)
    y, _ = compile_once(conv, x, backend_options=RELEASE)
    assert conv.weight.transposed and conv.weight.shape == (K, N)
    assert torch.equal(int8fx.quantize_(conv)(x), y)


def test_what_something_else_needs_in_float_stays(model, x):
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.embedding = nn.Embedding(N, K, _weight=model.up.weight.data)
            self.embedding.weight = model.up.weight
            self.register_buffer("buffer", torch.randn(N, K))

        def forward(self, x):
            return self.inner(x), x @ self.buffer.t(), self.inner.down.weight.sum()

    holds = Holds()
    with pytest.warns(UserWarning, match="release_weights kept") as warned:
        compile_once(holds, x, backend_options=RELEASE | {"only": ["*"]})
    (text,) = [str(w.message) for w in warned if "release_weights" in str(w.message)]
    assert "inner.up.weight: its memory is that of embedding.weight, too" in text
    assert "buffer: it is a buffer" in text
    assert "inner.down.weight: the graph reads it in float as well" in text
    assert type(model.up.weight) is nn.Parameter


def test_a_weight_of_another_scheme_is_released_with_its_settings(model, x):
    options = {"scheme": "w8a16-group", "group_size": 16}
    y, _ = compile_once(model, x, backend_options=RELEASE | options)
    assert model.up.weight.options == options
    assert torch.equal(int8fx.quantize_(model)(x), y)


def test_a_wrong_option_is_named():
    with pytest.raises(ValueError, match=r"'release_weights'.*given 1 .int.; allowed: True or False"):
        Options.parse({"release_weights": 1})
