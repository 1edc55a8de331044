"""Every scheme in vLLM: float weights quantised as they are loaded, with a calibration or without, and
int8fx's own files of them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import int8fx
from int8fx.calibration import Calibration
from int8fx.testing import serving

LINEARS = 4 * serving.LAYERS
PROMPTS = [[1, 2, 3, 4], list(range(5, 40))]
STATIC = {"decomposition": "static"}
ROTATED = {"scheme": "int8-rotated"}
CHOSEN = {"decomposition": "static", "columns": [0, 1, 2]}
BY_ROWS = "wna16-rows"  # whose groups of rows vLLM would cut and merge as rows
WITHOUT = {
    **{name: {"scheme": name} for name in int8fx.SCHEMES if name != BY_ROWS},
    "static": STATIC,
    "static, columns": CHOSEN,
    "rotated, block of 16": ROTATED | {"block": 16},
}
CALIBRATED = {
    "static": STATIC,
    "static, 4 columns": STATIC | {"columns": 4},
    "int8-rotated": ROTATED,
    "int8-rotated, 2 columns": ROTATED | {"columns": 2},
}


def overrides(**options):
    return {"hf_overrides": {"quantization_config": {"quant_method": "int8fx", **options}}}


def answers(files, **settings):
    with serving.engine(files, **settings, enforce_eager=True) as llm:
        return serving.answers(llm, PROMPTS), columns(llm)


def columns(llm):
    """How many columns each weight keeps, by layer; no layer is missing that int8fx serves."""
    (found,) = llm.collective_rpc(_columns)
    return found


def _columns(worker):
    named = worker.model_runner.model.named_modules()
    kept = {name: module.int8fx.choice for name, module in named if hasattr(module, "int8fx")}
    return {name: len(getattr(choice.settings, "columns", ())) for name, choice in kept.items()}


def quantized(**options):
    return int8fx.quantize_(serving.tiny_llama(tie_word_embeddings=False), **options)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A head of its own, which a calibration has in int8 as well."""
    model = serving.tiny_llama(tie_word_embeddings=False)
    return serving.save(model, tmp_path_factory.mktemp("models") / "untied")


@pytest.fixture(scope="module")
def its_calibration(tmp_path_factory):
    model = serving.tiny_llama(tie_word_embeddings=False)
    return serving.calibrated(model, tmp_path_factory.mktemp("calibrations") / "untied.json")


@pytest.mark.parametrize("options", WITHOUT.values(), ids=WITHOUT)
def test_own_files_answer_as_weights_quantised_online(untied, tmp_path, options):
    online, found = answers(untied, **overrides(**options))
    assert len(found) == LINEARS
    files = serving.save(quantized(**options), tmp_path / "quantized")
    assert answers(files) == (online, found)


@pytest.mark.parametrize("options", CALIBRATED.values(), ids=CALIBRATED)
def test_calibrated_columns_online_and_in_own_files(untied, its_calibration, tmp_path, options):
    online, found = answers(untied, **overrides(**options, calibration=str(its_calibration)))
    count = options.get("columns", 8)
    assert len(found) == LINEARS + ("scheme" in options)  # with rotations the head is in int8, too
    assert set(found.values()) == {count}
    assert online != answers(untied, **overrides(**options | {"columns": 0}))[0]
    files = serving.save(quantized(**options, calibration=its_calibration), tmp_path / "quantized")
    assert answers(files) == (online, found)


def test_tied_head_is_rotated_and_its_embedding_is_not(model, calibration):
    """As the backend does it (``passes/linears/select.py``)."""
    _, found = answers(model, **overrides(**ROTATED, calibration=str(calibration)))
    assert len(found) == LINEARS + 1


def test_rules_choose_what_a_calibration_is_for(model, calibration):
    rules = [["*.mlp.*", "int8-rotated", {"columns": 3}], ["*", "absmax-vector"]]
    _, found = answers(model, **overrides(rules=rules, calibration=str(calibration)))
    assert {count for name, count in found.items() if ".mlp." in name} == {3}
    assert {count for name, count in found.items() if ".self_attn." in name} == {0}


def test_calibration_of_another_model_is_refused(model, calibration, tmp_path):
    loaded = Calibration.load(calibration)
    linears = tuple(replace(each, shape=(2 * each.shape[0], each.shape[1])) for each in loaded.linears)
    other = str(tmp_path / "other.json")
    replace(loaded, linears=linears).save(other)
    with (
        pytest.raises(Exception, match=r"N=128, K=128 in the model, N=256, K=128 in the calibration"),
        serving.engine(model, **overrides(**STATIC, calibration=other), enforce_eager=True),
    ):
        pass


def test_calibration_that_no_scheme_takes_is_refused(model, calibration):
    with (
        pytest.raises(Exception, match="keeps no columns"),
        serving.engine(model, **overrides(calibration=str(calibration))),
    ):
        pass


def test_calibration_of_files_that_have_columns_is_refused(calibration, tmp_path):
    model = int8fx.quantize_(serving.tiny_llama(), **STATIC, calibration=calibration)
    files = serving.save(model, tmp_path / "quantized")
    given = overrides(**STATIC, calibration=str(calibration))
    with (
        pytest.raises(Exception, match="with its columns; leave out the option 'calibration'"),
        serving.engine(files, **given, enforce_eager=True),
    ):
        pass


def test_matrices_of_files_with_other_columns_are_refused(tmp_path):
    """q, k and v are one in vLLM."""
    model = serving.tiny_llama()
    keys = ["*.k_proj"]
    int8fx.quantize_(model, **STATIC, columns=[3, 4, 5], only=keys)
    int8fx.quantize_(model, **CHOSEN, skip=[*keys, "lm_head"])
    int8fx.save_checkpoint(model, tmp_path)
    model.config.save_pretrained(tmp_path)
    serving.words().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "int8fx", **STATIC}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(Exception, match=r"qkv_proj: .*differ in their schemes or columns"),
        serving.engine(tmp_path, enforce_eager=True),
    ):
        pass


def test_files_of_another_scheme_than_asked_for_are_refused(tmp_path):
    files = serving.save(int8fx.quantize_(serving.tiny_llama(), **STATIC), tmp_path / "quantized")
    with (
        pytest.raises(Exception, match=r"q_proj as weight_columns, .*, and the scheme 'w8a16-group'"),
        serving.engine(files, **overrides(scheme="w8a16-group"), enforce_eager=True),
    ):
        pass


def test_groups_of_rows_are_served_online_and_their_files_are_refused(model, tmp_path):
    _, found = answers(model, **overrides(scheme=BY_ROWS))
    assert len(found) == LINEARS
    files = serving.save(int8fx.quantize_(serving.tiny_llama(), scheme=BY_ROWS), tmp_path / "rows")
    with (
        pytest.raises(Exception, match="of which a part does not have the rows of the weight"),
        serving.engine(files, enforce_eager=True),
    ):
        pass


def test_damaged_files_are_refused(tmp_path):
    """What int8fx says when it loads them by itself, with the layer's name in vLLM."""
    model = int8fx.quantize_(serving.tiny_llama(), **STATIC)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.w_scale[5] = torch.nan
    files = serving.save(model, tmp_path / "quantized")
    with (
        pytest.raises(Exception, match=r"layers\.1\.mlp\.down_proj\.weight.*: corrupt"),
        serving.engine(files, enforce_eager=True),
    ):
        pass


def linear(sizes, inputs=64):
    """As far as the configuration looks at one of vLLM."""
    return SimpleNamespace(output_sizes=sizes, output_size=sum(sizes), input_size=inputs)


def test_shapes_of_the_matrices_behind_one_layer():
    """A layer that the files have as one matrix as well, one of several, and one cut otherwise."""
    from int8fx.integrations.vllm.config import _shapes

    assert _shapes(linear([8, 8]), ["qkv"]) == [(16, 64)]
    assert _shapes(linear([8, 4]), ["gate", "up"]) == [(8, 64), (4, 64)]
    with pytest.raises(ValueError, match="keeps qkv, z as one matrix of 4 parts"):
        _shapes(linear([8, 8, 4, 4]), ["qkv", "z"])
