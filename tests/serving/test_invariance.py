"""The same answers, bit for bit, whatever else a server computes, and in however many processes."""

import functools
import random

import pytest

import int8fx
from int8fx.testing import serving

INTERLEAVINGS = 50


ROW_LOCAL = {
    "token": {"decomposition": "token"},
    "static": {"decomposition": "static", "columns": [0, 1, 2, 77]},
    "absmax-vector": {"scheme": "absmax-vector"},
    "int8-rotated": {"scheme": "int8-rotated"},
    "int8-rotated, calibrated": {"scheme": "int8-rotated", "calibration": "of the model"},
}
COLUMN = {"decomposition": "column"}


@pytest.fixture(scope="module")
def in_scheme(calibration):
    """What vLLM is given for a scheme."""

    def given(scheme, **settings):
        options = {"quant_method": "int8fx", **{**ROW_LOCAL, "column": COLUMN}[scheme]}
        if "calibration" in options:
            options["calibration"] = str(calibration)
        return {"hf_overrides": {"quantization_config": options}, **settings}

    return given


@pytest.fixture(scope="module")
def prompts():
    return serving.random_prompts(8, random.Random(0))


@pytest.fixture(scope="module")
def alone(model, prompts, in_scheme):
    """Answers of an engine that has one request at a time and computes a prompt in one step."""

    @functools.cache
    def ask(scheme, enforce_eager=True):
        settings = in_scheme(scheme, enforce_eager=enforce_eager, enable_prefix_caching=False)
        with serving.engine(model, **settings) as llm:
            return [serving.answers(llm, [prompt])[0] for prompt in prompts]

    return ask


def different(llm, prompts, expected, count):
    random_ = random.Random(1)
    found = []
    for _ in range(count):
        answers = serving.interleaved(llm, prompts, random_)
        found += [number for number, each in enumerate(answers) if each != expected[number]]
    return found


@pytest.mark.parametrize("scheme", ROW_LOCAL)
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "compiled"])
def test_company_changes_nothing(model, prompts, alone, in_scheme, scheme, enforce_eager):
    """With prompts in chunks of 32 tokens, and the beginnings that they share from the cache."""
    expected = alone(scheme, enforce_eager)
    settings = in_scheme(scheme, enforce_eager=enforce_eager, max_num_batched_tokens=32)
    with serving.engine(model, **settings) as llm:
        assert different(llm, prompts, expected, INTERLEAVINGS) == []


def test_prefix_caching_changes_nothing(model, prompts, alone, in_scheme):
    expected = alone("token")
    settings = in_scheme("token", enforce_eager=True, enable_prefix_caching=False)
    with serving.engine(model, **settings) as llm:
        assert different(llm, prompts, expected, 5) == []


def test_company_changes_the_column_decomposition(model, prompts, alone, in_scheme):
    """The control: a column with an outlier in any row of the batch is taken out of all."""
    expected = alone("column")
    with serving.engine(model, **in_scheme("column", enforce_eager=True)) as llm:
        assert different(llm, prompts, expected, 2)


@pytest.mark.parametrize("scheme", ROW_LOCAL)
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "compiled"])
def test_two_processes_answer_as_one(model, prompts, alone, in_scheme, scheme, enforce_eager):
    expected = alone(scheme, enforce_eager)
    settings = in_scheme(scheme, enforce_eager=enforce_eager, tensor_parallel_size=2)
    with serving.engine(model, **settings) as llm:
        assert serving.answers(llm, prompts) == expected


def test_two_processes_answer_as_one_with_biases_and_a_head_of_its_own(tmp_path, prompts, in_scheme):
    """A process has the biases of its outputs; of an output projection vLLM gives the first all."""
    kinds = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    files = serving.save(serving.tiny_llama(**kinds), tmp_path / "biases")
    with serving.engine(files, **in_scheme("token", enforce_eager=True)) as llm:
        expected = serving.answers(llm, prompts)
    settings = in_scheme("token", enforce_eager=True, tensor_parallel_size=2)
    with serving.engine(files, **settings) as llm:
        assert serving.answers(llm, prompts) == expected


@pytest.mark.parametrize("scheme", ["token", "int8-rotated"])
def test_two_processes_answer_as_one_from_files(tmp_path, prompts, scheme):
    quantized = int8fx.quantize_(serving.tiny_llama(), **ROW_LOCAL[scheme])
    files = serving.save(quantized, tmp_path / "quantized")
    with serving.engine(files, enforce_eager=True) as llm:
        expected = serving.answers(llm, prompts)
    with serving.engine(files, enforce_eager=True, tensor_parallel_size=2) as llm:
        assert serving.answers(llm, prompts) == expected
