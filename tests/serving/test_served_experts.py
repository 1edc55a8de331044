"""Mixtures of experts in vLLM, whose experts are in int8 as the backend has them in transformers."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import int8fx
from int8fx.testing import serving

PROMPTS = [[1, 2, 3, 4], list(range(5, 40))]
SHAPES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}
# What vLLM's models have in float whatever the quantisation is.
IN_FLOAT = ["lm_head", "*.gate", "*.shared_expert_gate"]
SCHEMES = {
    "token": {"decomposition": "token"},
    "static": {"decomposition": "static", "columns": [3, 5]},
    "int8-rotated": {"scheme": "int8-rotated"},
}


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SHAPES, intermediate_size=128, num_local_experts=4))


def qwen():
    """With an expert that all rows meet, beside those that they are sent to."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **SHAPES,
        intermediate_size=256,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return Qwen2MoeForCausalLM(config)


@pytest.fixture(scope="module", params=[mixtral, qwen], ids=lambda make: make.__name__)
def files(request, tmp_path_factory):
    model = request.param().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "gate.weight" not in name:
            parameter.data.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp("models") / request.param.__name__
    return serving.save(model, folder)


def in_vllm(files, **settings):
    """The experts' buffers by layer, and the log-probability of the first word of each answer."""
    with serving.engine(files, dtype="float32", **settings) as llm:
        (experts,) = llm.collective_rpc(_experts)
        answers = serving.answers(llm, PROMPTS, tokens=1)
    return experts, [answer[0] for answer in answers]


def _experts(worker):
    named = worker.model_runner.model.named_modules()
    return sum(hasattr(module, "int8fx_w13_int8") for _, module in named)


@pytest.mark.parametrize("options", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "compiled"])
def test_first_words_are_those_of_the_backend_in_transformers(files, options, enforce_eager):
    overrides = {"quantization_config": {"quant_method": "int8fx", **options}}
    experts, found = in_vllm(files, hf_overrides=overrides, enforce_eager=enforce_eager)
    assert experts == SHAPES["num_hidden_layers"]
    model = AutoModelForCausalLM.from_pretrained(files, dtype=torch.float32).requires_grad_(False)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="llmint8", options={**options, "skip": IN_FLOAT})
    with int8fx.collect_reports() as reports:
        for prompt, (token, logprob) in zip(PROMPTS, found, strict=True):
            logits = compiled(torch.tensor([prompt])).logits[0, -1]
            assert logits.argmax() == token
            # A value that rounds to another integer moves a logit by a step of its scale.
            assert logits.log_softmax(-1)[token].item() == pytest.approx(logprob, abs=0.01)
    assert any(each.accepted and "experts" in each.path for each in reports[0].decisions)


def test_calibration_names_the_experts(tmp_path):
    """As transformers calls their matrices; each has columns of its own."""
    model = qwen().eval()
    files = serving.save(model, tmp_path / "qwen")
    file = serving.calibrated(model, tmp_path / "calibration.json")
    options = {"quant_method": "int8fx", "scheme": "int8-rotated", "calibration": str(file)}
    overrides = {"quantization_config": options}
    with serving.engine(files, hf_overrides=overrides, enforce_eager=True) as llm:
        (found,) = llm.collective_rpc(_columns)
        serving.answers(llm, PROMPTS, tokens=2)
    assert found == [(8, 8)] * SHAPES["num_hidden_layers"]


def _columns(worker):
    layers = [each for each in worker.model_runner.model.modules() if hasattr(each, "int8fx_w13_int8")]
    return [(len(each.int8fx_w13_which), len(each.int8fx_w2_which)) for each in layers]


def test_scheme_without_a_product_for_experts_leaves_them_in_float(tmp_path):
    files = serving.save(mixtral().eval(), tmp_path / "mixtral")
    overrides = {"quantization_config": {"quant_method": "int8fx", "scheme": "zeropoint-vector"}}
    experts, _ = in_vllm(files, hf_overrides=overrides, enforce_eager=True)
    assert experts == 0
