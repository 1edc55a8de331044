"""How vLLM compiles a model in int8: with ``llmint8`` unless asked otherwise, once."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import int8fx
from int8fx.calibration import Calibration
from int8fx.options import Options
from int8fx.testing import serving

PROMPTS = [[1, 2, 3, 4], list(range(5, 40))]
LINEARS = 4 * serving.LAYERS
TOKEN = {"quant_method": "int8fx", "decomposition": "token"}


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
    assert log()[1] == f"int8fx: {LINEARS} of {LINEARS + 1} layers in llm.int8"


SCHEMES = {
    "llm.int8": {},
    "static": {"decomposition": "static", "columns": [1, 2, 3]},
    "int8-rotated": {"scheme": "int8-rotated"},
    "zeropoint-vector": {"scheme": "zeropoint-vector"},
    "w8a16-group": {"scheme": "w8a16-group"},
}


@pytest.mark.parametrize("options", SCHEMES.values(), ids=SCHEMES)
def test_every_scheme_is_in_the_graph_and_a_second_start_compiles_nothing(model, log, cache, options):
    settings = {"hf_overrides": {"quantization_config": {"quant_method": "int8fx", **options}}}
    with int8fx.collect_reports() as reports, serving.engine(model, **settings) as llm:
        expected = serving.answers(llm, PROMPTS)
    (report,) = reports
    scheme = options.get("scheme", "llm.int8")
    assert [each.scheme for each in report.decisions] == [scheme] * LINEARS
    assert log()[0] == "int8fx: compiled by 'llmint8' in mode 2, int8 linears fused"
    before = counters()
    with int8fx.collect_reports() as reports, serving.engine(model, **settings) as llm:
        assert serving.answers(llm, PROMPTS) == expected
    assert reports == []
    after = counters()
    assert after.num_aot_artifacts_loaded == before.num_aot_artifacts_loaded + 1
    assert after.num_aot_compiles == before.num_aot_compiles


def test_another_calibration_in_the_same_file_is_taken(model, cache, calibration, tmp_path):
    """Columns are inputs of the compiled code, which the second start does not compile again."""
    file = tmp_path / "calibration.json"
    options = {"quant_method": "int8fx", "scheme": "int8-rotated", "calibration": str(file)}
    settings = {"hf_overrides": {"quantization_config": options}}
    found = Calibration.load(calibration)
    turned = [replace(each, columns=each.columns[::-1]) for each in found.linears]
    answers = {}
    for name, linears in {"first": found.linears, "other": tuple(turned)}.items():
        replace(found, linears=linears).save(file)
        for enforce_eager in (False, True):
            with serving.engine(model, **settings, enforce_eager=enforce_eager) as llm:
                answers[name, enforce_eager] = serving.answers(llm, PROMPTS, tokens=1)
    assert answers["first", True] != answers["other", True]
    for name, other in (("first", "other"), ("other", "first")):
        compiled = answers[name, False]
        assert _distance(compiled, answers[name, True]) < _distance(compiled, answers[other, True])


def _distance(one, other):
    return max(abs(left[0][1] - right[0][1]) for left, right in zip(one, other, strict=True))


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
    ],
    ids=["eager", "inductor"],
)
def test_what_the_user_asks_for_stays(model, log, cache, settings, line):
    with serving.engine(model, quantization="int8fx", **settings) as llm:
        serving.answers(llm, PROMPTS)
    assert log()[:2] == [line, f"int8fx: {LINEARS} of {LINEARS + 1} layers in llm.int8"]


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
    assert any(line.startswith("int8fx: no layer of this model is quantised\n") for line in log())


def adapter(folder):
    """One on disk, and its model of transformers."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(serving.tiny_llama().float(), config)
    model.save_pretrained(folder)
    return int8fx.quantize_(model, decomposition="token", skip=["*lm_head", "*lora_*"])


def farthest(model, answers):
    """Of all tokens, see ``serving.gaps``."""
    pairs = zip(PROMPTS, answers, strict=True)
    return max(serving.gaps(model, prompt, [t for t, _ in answer]).amax() for prompt, answer in pairs)


def test_adapters_run_eagerly(model, log, tmp_path):
    from vllm.lora.request import LoRARequest

    expected = adapter(tmp_path / "lora")
    settings = {"hf_overrides": {"quantization_config": TOKEN}, "dtype": "float32"}
    with serving.engine(model, **settings, enable_lora=True) as llm:
        plain = serving.answers(llm, PROMPTS)
        request = LoRARequest("adapter", 1, str(tmp_path / "lora"))
        given = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.generate(given, serving.greedy(16), use_tqdm=False, lora_request=request)
        found = [serving.answer_of(each) for each in outputs]
    assert log()[0] == "int8fx: eager, int8 linears by operators"
    # Sums of an adapter are rounded elsewhere in vLLM; some values become another integer.
    assert farthest(expected, found) < 0.25
    assert farthest(expected, plain) > 1


CUT = {
    "columns": (SCHEMES["static"], None),
    "files": (SCHEMES["int8-rotated"], {"weight_int8": (128,), "weight_scheme": ()}),
}


@pytest.mark.parametrize(("options", "sizes"), CUT.values(), ids=CUT)
def test_adapters_on_several_processes_and_what_is_of_all_columns_are_refused(options, sizes):
    """With adapters vLLM's cut of a weight along K stays: here each of two processes has half of it."""
    from int8fx.integrations.vllm.files import StoredWeight
    from int8fx.integrations.vllm.linears import Int8FxLinearMethod

    stored = None if sizes is None else StoredWeight(sizes)
    method = Int8FxLinearMethod(Options.parse(options).choice(""), stored, fused=False)
    layer = SimpleNamespace(prefix="layers.0.o_proj")
    with pytest.raises(ValueError, match=r"layers\.0\.o_proj: adapters .* of all of K; leave"):
        method.create_weights(layer, 64, [128], 128, 128, torch.bfloat16, weight_loader=print)
