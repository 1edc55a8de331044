"""The same answers, bit for bit, whatever else a server computes, and in however many processes."""

import functools
import random

import pytest

from int8fx.testing import serving

INTERLEAVINGS = 50


def in_scheme(scheme: str = "llm.int8", **settings):
    options = {"quant_method": "int8fx", "scheme": scheme, **settings}
    return {"hf_overrides": {"quantization_config": options}}


ROW_LOCAL = {
    "token": in_scheme(decomposition="token"),
    "absmax-vector": in_scheme("absmax-vector"),
}
SCHEMES = {**ROW_LOCAL, "column": in_scheme(decomposition="column")}


@pytest.fixture(scope="module")
def prompts():
    return serving.random_prompts(8, random.Random(0))


@pytest.fixture(scope="module")
def alone(model, prompts):
    """Answers of an engine that has one request at a time and computes a prompt in one step."""

    @functools.cache
    def ask(scheme, enforce_eager=True):
        settings = SCHEMES[scheme] | {"enforce_eager": enforce_eager, "enable_prefix_caching": False}
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
def test_company_changes_nothing(model, prompts, alone, scheme, enforce_eager):
    """With prompts in chunks of 32 tokens, and the beginnings that they share from the cache."""
    expected = alone(scheme, enforce_eager)
    settings = {"max_num_batched_tokens": 32, "enforce_eager": enforce_eager}
    with serving.engine(model, **ROW_LOCAL[scheme], **settings) as llm:
        assert different(llm, prompts, expected, INTERLEAVINGS) == []


def test_prefix_caching_changes_nothing(model, prompts, alone):
    expected = alone("token")
    settings = ROW_LOCAL["token"] | {"enforce_eager": True, "enable_prefix_caching": False}
    with serving.engine(model, **settings) as llm:
        assert different(llm, prompts, expected, 5) == []


def test_company_changes_the_column_decomposition(model, prompts, alone):
    """The control: a column with an outlier in any row of the batch is taken out of all."""
    expected = alone("column")
    with serving.engine(model, **SCHEMES["column"], enforce_eager=True) as llm:
        assert different(llm, prompts, expected, 2)


@pytest.mark.parametrize(
    ("scheme", "enforce_eager"),
    [("token", True), ("absmax-vector", True), ("token", False)],
    ids=["eager-token", "eager-absmax-vector", "compiled-token"],
)
def test_two_processes_answer_as_one(model, prompts, alone, scheme, enforce_eager):
    expected = alone(scheme, enforce_eager)
    settings = ROW_LOCAL[scheme] | {"enforce_eager": enforce_eager, "tensor_parallel_size": 2}
    with serving.engine(model, **settings) as llm:
        assert serving.answers(llm, prompts) == expected
