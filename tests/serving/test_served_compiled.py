"""How vLLM compiles a model in int8: with ``llmint8`` unless asked otherwise, once."""

import logging

import pytest

import int8fx
from int8fx.testing import serving

PROMPTS = [[1, 2, 3, 4], list(range(5, 40))]
LINEARS = 4 * serving.LAYERS
ZEROPOINT = {"quant_method": "int8fx", "scheme": "zeropoint-vector"}


@pytest.fixture
def log():
    """What int8fx wrote to vLLM's log."""
    lines = []

    def keep(record):
        lines.append(record.getMessage())
        return True

    # A filter: vLLM sets its loggers up when it starts, and takes handlers away from those below.
    logger = logging.getLogger("vllm.int8fx")
    logger.addFilter(keep)
    yield lambda: lines
    logger.removeFilter(keep)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))


def counters():
    from vllm.compilation.counter import compilation_counter

    return compilation_counter.clone()


def test_default_compiles_with_ours_and_fuses_every_linear(model, log, cache):
    with int8fx.collect_reports() as reports, serving.engine(model, quantization="int8fx") as llm:
        serving.answers(llm, PROMPTS)
    (report,) = reports
    accepted = [decision for decision in report.decisions if decision.accepted]
    assert len(accepted) == len(report.decisions) == LINEARS
    assert report.graph.count("int8_linears") >= LINEARS
    assert log()[0] == "int8fx: compiled by 'llmint8' in mode 2, int8 linears fused"
    assert log()[1] == f"int8fx: {LINEARS} of {LINEARS + 1} layers in int8"


def test_second_start_compiles_nothing(model, cache):
    with serving.engine(model, quantization="int8fx") as llm:
        expected = serving.answers(llm, PROMPTS)
    before = counters()
    with int8fx.collect_reports() as reports, serving.engine(model, quantization="int8fx") as llm:
        assert serving.answers(llm, PROMPTS) == expected
    assert reports == []
    after = counters()
    assert after.num_aot_artifacts_loaded == before.num_aot_artifacts_loaded + 1
    assert after.num_aot_compiles == before.num_aot_compiles


def test_other_options_are_another_graph(model, cache):
    """The threshold is a constant of the compiled code."""
    with serving.engine(model, quantization="int8fx"):
        pass
    changed = {"quantization_config": {"quant_method": "int8fx", "threshold": 3.0}}
    with int8fx.collect_reports() as reports, serving.engine(model, hf_overrides=changed):
        pass
    assert len(reports) == 1
    assert ", 3.0, 'column'" in reports[0].graph


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"enforce_eager": True}, "int8fx: eager, int8 linears by operators"),
        (
            {"compilation_config": {"mode": 3}},
            "int8fx: compiled by 'inductor' in mode 2, int8 linears by operators",
        ),
        (
            {"hf_overrides": {"quantization_config": ZEROPOINT}},
            "int8fx: compiled by 'llmint8' in mode 2, int8 linears by operators where their scheme has "
            "no fused form in vLLM",
        ),
    ],
    ids=["eager", "inductor", "zeropoint-vector"],
)
def test_what_the_user_asks_for_stays(model, log, cache, settings, line):
    with serving.engine(model, quantization="int8fx", **settings) as llm:
        serving.answers(llm, PROMPTS)
    assert log()[:2] == [line, f"int8fx: {LINEARS} of {LINEARS + 1} layers in int8"]


def test_backend_without_the_quantisation_warns(model, log, cache):
    """vLLM's linears hide behind an operator of oneDNN: there is nothing to rewrite."""
    settings = {"compilation_config": {"mode": 2, "backend": "llmint8"}}
    with serving.engine(model, **settings):
        pass
    assert any("give --quantization int8fx as well" in line for line in log())


def test_nothing_in_int8_warns(model, log, cache):
    nothing = {"quantization_config": {"quant_method": "int8fx", "only": ["no.such.module"]}}
    with serving.engine(model, hf_overrides=nothing, enforce_eager=True):
        pass
    assert any(line.startswith("int8fx: no layer of this model is in int8\n") for line in log())


def test_adapters_run_eagerly(model, log, tmp_path):
    peft = pytest.importorskip("peft")
    from vllm.lora.request import LoRARequest

    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(serving.tiny_llama(), config).save_pretrained(tmp_path / "lora")
    with serving.engine(model, quantization="int8fx", enable_lora=True) as llm:
        plain = serving.answers(llm, PROMPTS)
        request = LoRARequest("adapter", 1, str(tmp_path / "lora"))
        given = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.generate(given, serving.greedy(16), use_tqdm=False, lora_request=request)
        assert [serving.answer_of(each) for each in outputs] != plain
    assert log()[0] == "int8fx: eager, int8 linears by operators"
