"""What vLLM serves: float weights quantised as they are loaded, and files in int8, without a flag."""

from types import SimpleNamespace

import pytest

import int8fx
from int8fx.testing import serving

# qkv, o, gate_up and down of each layer.
LINEARS = 4 * serving.LAYERS
PROMPTS = [[1, 2, 3, 4], list(range(5, 40))]
TOKEN = {"decomposition": "token"}


def options(**given):
    return {"hf_overrides": {"quantization_config": {"quant_method": "int8fx", **given}}}


def linears(llm):
    """The layers of the model that int8fx serves, by name, and whether their weight is int8fx's."""
    (worker,) = llm.collective_rpc(_linears)
    return worker


def _linears(worker):
    model = worker.model_runner.model
    return {
        name: isinstance(module.weight, int8fx.Int8Weight)
        for name, module in model.named_modules()
        if hasattr(module, "int8fx")
    }


@pytest.fixture(scope="module")
def online(model):
    with serving.engine(model, **options(**TOKEN), enforce_eager=True) as llm:
        return linears(llm), serving.answers(llm, PROMPTS)


def test_every_linear_becomes_int8_and_the_head_does_not(online):
    found, _ = online
    assert len(found) == LINEARS
    assert all(found.values())
    assert not any("lm_head" in name for name in found)


def test_own_files_need_no_flag_and_answer_as_weights_quantised_online(model, online, tmp_path):
    quantized = int8fx.quantize_(serving.tiny_llama(), **TOKEN)
    with serving.engine(serving.save(quantized, tmp_path / "int8"), enforce_eager=True) as llm:
        assert linears(llm) == online[0]
        assert serving.answers(llm, PROMPTS) == online[1]


def test_own_files_keep_what_was_skipped_in_float(model, tmp_path):
    quantized = int8fx.quantize_(serving.tiny_llama(), skip=["lm_head", "*.layers.0.mlp.down_proj"])
    with serving.engine(serving.save(quantized, tmp_path / "int8"), enforce_eager=True) as llm:
        assert len(linears(llm)) == LINEARS - 1
        serving.answers(llm, PROMPTS)


def test_bitsandbytes_files_need_no_flag(model, tmp_path):
    """They have the scales that weights quantised online get, and the column decomposition."""
    with serving.engine(model, quantization="int8fx", enforce_eager=True) as llm:
        expected = serving.answers(llm, PROMPTS)
    with serving.engine(serving.of_bitsandbytes(model, tmp_path / "bnb"), enforce_eager=True) as llm:
        assert len(linears(llm)) == LINEARS
        assert serving.answers(llm, PROMPTS) == expected


def test_compressed_tensors_files_run_on_our_product(model, tmp_path):
    """W8A8 with a scale per token is the scheme absmax-vector."""
    with serving.engine(model, **options(scheme="absmax-vector"), enforce_eager=True) as llm:
        expected = serving.answers(llm, PROMPTS)
    files = serving.of_compressed_tensors(model, tmp_path / "w8a8")
    with serving.engine(files, enforce_eager=True) as llm:
        assert len(linears(llm)) == LINEARS
        assert serving.answers(llm, PROMPTS) == expected


def test_output_head_in_int8(model):
    """Tied to the embedding, which stays in float."""
    with serving.engine(model, **options(skip=[]), enforce_eager=True) as llm:
        assert any("lm_head" in name or "embed_tokens" in name for name in linears(llm))
        serving.answers(llm, PROMPTS)


def test_rules_by_module(model):
    rules = [["*.mlp.*", "absmax-vector"]]
    with serving.engine(model, **options(rules=rules), enforce_eager=True) as llm:
        (schemes,) = llm.collective_rpc(_schemes)
    assert {value for name, value in schemes.items() if ".mlp." in name} == {"absmax-vector"}
    assert {value for name, value in schemes.items() if ".self_attn." in name} == {"llm.int8"}


def _schemes(worker):
    named = worker.model_runner.model.named_modules()
    return {name: each.weight.options["scheme"] for name, each in named if hasattr(each, "int8fx")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": -1}, "a number >= 0"),
        ({"scheme": "int9"}, "'llm.int8'"),
        ({"decompositoin": "token"}, "unknown option 'decompositoin'.*allowed: .*decomposition"),
    ],
)
def test_wrong_option_ends_the_start(model, given, message):
    with pytest.raises(Exception, match=message), serving.engine(model, **options(**given)):
        pass


def test_one_matrix_has_one_scheme(model):
    """q, k and v are one in vLLM."""
    with (
        pytest.raises(Exception, match=r"keeps .*q_proj.* as one matrix"),
        serving.engine(model, **options(skip=["*.q_proj"]), enforce_eager=True),
    ):
        pass


def test_head_in_int8_files_is_served(tmp_path):
    """vLLM pads its rows to a multiple of 64; here there are 60 words."""
    model = serving.tiny_llama(tie_word_embeddings=False, vocab_size=60, eos_token_id=59)
    files = serving.save(model, tmp_path / "float")
    with serving.engine(files, **options(**TOKEN, skip=[]), enforce_eager=True) as llm:
        found, expected = linears(llm), serving.answers(llm, PROMPTS)
    assert "lm_head" in found
    files = serving.save(int8fx.quantize_(model, **TOKEN, skip=[]), tmp_path / "int8")
    with serving.engine(files, enforce_eager=True) as llm:
        assert linears(llm).keys() == found.keys()
        assert serving.answers(llm, PROMPTS) == expected


def test_head_in_int8_files_that_the_model_ties_is_refused():
    """Its parameters would not be loaded, as vLLM passes over a tied head's."""
    from int8fx.integrations.vllm.files import StoredWeight
    from int8fx.integrations.vllm.heads import HeadMethod

    choice = int8fx.SCHEMES["llm.int8"].choice()
    method = HeadMethod(choice, StoredWeight({"weight": (128,), "weight_scale": ()}))
    with pytest.raises(ValueError, match="lm_head is in int8 in the files, and the model ties it"):
        method.tie_weights(SimpleNamespace(prefix="lm_head"), None)


def test_scheme_that_files_are_not_in_is_refused(tmp_path):
    files = serving.save(int8fx.quantize_(serving.tiny_llama()), tmp_path / "int8")
    with (
        pytest.raises(Exception, match="as int8 per channel, and the scheme 'int8-rotated'"),
        serving.engine(files, **options(scheme="int8-rotated"), enforce_eager=True),
    ):
        pass
