"""bitsandbytes, the real package: its checkpoints, read and written, and its models, compiled."""

import shutil

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import int8fx
from int8fx.testing.bounds import expected_and_bound
from int8fx.testing.support import compile_once

bitsandbytes = pytest.importorskip("bitsandbytes")
from int8fx.integrations.bitsandbytes import to_bitsandbytes  # noqa: E402

K, N = 64, 96


class Model(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.up, self.gate = linear(K, N), linear(K, N)
        self.down = linear(N, K, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)) * self.gate(x))


@pytest.fixture
def floats():
    torch.manual_seed(0)
    return Model(nn.Linear).half().requires_grad_(False)


@pytest.fixture
def x():
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1)).half()
    x[0, 3, 7] = 20
    return x


def theirs(floats, threshold=6.0):
    def linear(*args, **kwargs):
        return bitsandbytes.nn.Linear8bitLt(
            *args, has_fp16_weights=False, threshold=threshold, **kwargs
        )

    model = Model(linear).half()
    model.load_state_dict(floats.state_dict())
    return model.to("cpu").eval().requires_grad_(False)


def test_reads_their_checkpoint_bit_for_bit(floats, x):
    model, state = int8fx.quantize_(Model(nn.Linear).half()), theirs(floats).state_dict()
    assert "up.SCB" in state and "up.weight_format" in state
    model.load_state_dict(state)
    assert torch.equal(model.up.weight.w_int8, state["up.weight"])
    torch.testing.assert_close(model.up.weight.w_scale * 127, state["up.SCB"])


def test_they_read_our_checkpoint_bit_for_bit(floats, x):
    ours = int8fx.quantize_(floats)
    read = theirs(Model(nn.Linear).half())
    read.load_state_dict(to_bitsandbytes(ours.state_dict()))
    assert torch.equal(read.up.weight, ours.up.weight.w_int8)
    torch.testing.assert_close(read(x), ours(x), rtol=0.02, atol=0.02)


def test_what_bitsandbytes_has_no_name_for():
    state = {"in_proj": torch.ones(2, 2, dtype=torch.int8), "in_proj_scale": torch.ones(2)}
    with pytest.raises(ValueError, match="in_proj: bitsandbytes keeps int8 values under 'weight' only"):
        to_bitsandbytes(state)


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_their_model_is_one_graph_of_our_operators(floats, x, threshold, called_before):
    model = theirs(floats, threshold)
    if called_before:
        model(x)
    y, report = compile_once(model, x)
    assert [(d.path, d.spelling) for d in report.accepted] == [
        ("up", "bitsandbytes"),
        ("gate", "bitsandbytes"),
        ("down", "bitsandbytes"),
    ]
    code = [line for line in report.graph.splitlines() if not line.strip().startswith("#")]
    assert not any("bitsandbytes" in line or "set_" in line for line in code)
    # up and gate read one input.
    assert report.graph.count("int8fx.quantized_linears_cpu") == 2
    assert f"{threshold}, 'column'" in report.graph
    ours = int8fx.quantize_(floats, threshold=threshold)
    torch.testing.assert_close(y, ours(x), rtol=0.02, atol=0.02)


def test_skipped_it_stays_theirs(floats, x):
    model = theirs(floats)
    y, report = compile_once(model, x, backend_options={"skip": ["up", "gate"]})
    assert [d.reason for d in report.decisions] == [
        "skip: matches 'up'",
        "skip: matches 'gate'",
        "",
    ]
    assert "bitsandbytes.int8_mixed_scaled_mm" in report.graph
    torch.testing.assert_close(y, model(x), rtol=0.02, atol=0.02)


def test_a_linear_of_theirs_keeps_the_scheme_bound(floats, x):
    model = theirs(floats)
    y, _ = compile_once(model.down, torch.relu(model.up(x)))
    expected, bound = expected_and_bound(
        torch.relu(model.up(x)), floats.down.weight, None, 6.0, "column"
    )
    # bitsandbytes rounds the weight with another order of operations: a step more at a tie.
    assert ((y.double() - expected).abs() <= 1.1 * bound).all()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama as bitsandbytes loads it, its files as transformers writes them, and as it was."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=100,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).half().save_pretrained(path / "floats")
    in_8bit = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    model = LlamaForCausalLM.from_pretrained(path / "floats", dtype=torch.float16, **in_8bit).eval()
    model.save_pretrained(path / "theirs")
    return path, model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(8).unsqueeze(0)).logits


def test_a_model_loaded_in_8bit_by_transformers_compiles(llama):
    _, model = llama
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="llmint8", fullgraph=True)
    with int8fx.collect_reports() as reports:
        y = logits(compiled)
    (report,) = reports
    assert [d.spelling for d in report.accepted] == ["bitsandbytes"] * 7
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_reads_what_transformers_wrote_with_bitsandbytes(llama):
    path, model = llama
    with torch.device("meta"):
        empty = LlamaForCausalLM(model.config).half().eval()
    read = int8fx.load_checkpoint(int8fx.quantize_(empty), path / "theirs")
    read.model.rotary_emb = type(read.model.rotary_emb)(read.config)
    up = model.model.layers[0].mlp.up_proj
    assert torch.equal(read.model.layers[0].mlp.up_proj.weight.w_int8, up.weight)
    torch.testing.assert_close(logits(read), logits(model), rtol=0.02, atol=0.02)


def test_transformers_reads_with_bitsandbytes_what_we_wrote(llama, tmp_path):
    path, _ = llama
    ours = int8fx.quantize_(LlamaForCausalLM.from_pretrained(path / "floats", dtype=torch.float16))
    state = to_bitsandbytes(ours.state_dict())
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(path / "theirs" / "config.json", tmp_path)
    read = LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    up = read.model.layers[0].mlp.up_proj
    assert isinstance(up, bitsandbytes.nn.Linear8bitLt)
    assert torch.equal(up.weight, ours.model.layers[0].mlp.up_proj.weight.w_int8)
    torch.testing.assert_close(logits(read), logits(ours), rtol=0.02, atol=0.02)
