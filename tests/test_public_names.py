"""The public names in a user's hands: examples that run, misuse that is named, and how things print."""

import doctest
import inspect
import pickle
import re
import typing
import warnings

import pytest
import torch
from torch import nn

import int8fx
from int8fx.ahead.compile import compile_model
from int8fx.errors import UserError
from int8fx.integrations.bitsandbytes import to_bitsandbytes
from int8fx.option_names import QuantizeOptions
from int8fx.options import OUTPUT_HEADS
from int8fx.options_file import save_options
from int8fx.weights.quantize import OPTIONS

PUBLIC = [getattr(int8fx, name) for name in int8fx.__all__ if name != "SCHEMES"] + [
    type(int8fx.SCHEMES)
]


def two() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).requires_grad_(False)


# --- examples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("public", PUBLIC, ids=lambda each: each.__name__)
def test_the_example_in_its_docstring_runs(public):
    (example, *_) = doctest.DocTestFinder(recurse=False).find(public, public.__name__, globs={})
    assert example.examples, f"{public.__name__} has no example"
    torch.manual_seed(0)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert doctest.DocTestRunner().run(example).failed == 0


# --- misuse ---------------------------------------------------------------------------------------

NO_MODULE = {
    "a name": "HuggingFaceTB/SmolLM2",
    "nothing": None,
    "a class": nn.Linear,
    "weights": {"weight": torch.zeros(2, 2)},
}
OF_A_MODULE = {
    "quantize_": int8fx.quantize_,
    "dequantize_": int8fx.dequantize_,
    "decisions": int8fx.decisions,
    "save_checkpoint": lambda model: int8fx.save_checkpoint(model, "folder"),
    "load_checkpoint": lambda model: int8fx.load_checkpoint(model, "folder"),
}


@pytest.mark.parametrize("given", NO_MODULE.values(), ids=NO_MODULE)
@pytest.mark.parametrize("name", OF_A_MODULE)
def test_what_is_no_module_is_named(name, given):
    with pytest.raises(
        TypeError, match=rf"^{name}: given (str|NoneType|the class Linear|dict); allowed: "
    ):
        OF_A_MODULE[name](given)


OF_A_FUNCTION = {
    "explain": lambda model: int8fx.explain(model, torch.ones(1)),
    "suggest": lambda model: int8fx.suggest(model, torch.ones(1), budget={"kl": 1.0}),
    "calibrate": lambda model: int8fx.calibrate(model, [torch.ones(1)]),
}


@pytest.mark.parametrize("name", OF_A_FUNCTION)
def test_what_cannot_be_called_is_named(name):
    with pytest.raises(
        TypeError, match=f"^{name}: given str; allowed: a torch.nn.Module or a function"
    ):
        OF_A_FUNCTION[name]("HuggingFaceTB/SmolLM2")


def test_what_a_pipeline_holds_is_named():
    class Pipeline:
        model = two()

    with pytest.raises(TypeError, match=r"given Pipeline; .*; its .model is a Sequential"):
        int8fx.quantize_(Pipeline())


ONES = torch.ones(1, 64)
MISUSED = {
    "the backend on a model": (lambda: int8fx.llmint8(two(), ()), r"Sequential; .*torch\.compile"),
    "a model as its state": (lambda: to_bitsandbytes(two()), "given Sequential; allowed"),
    "a name compiled ahead": (lambda: compile_model("smollm2", None, "out"), "model: given str"),
    "any model compiled ahead": (lambda: compile_model(two(), None, "out"), "is no causal"),
    "a weight of nothing": (int8fx.Int8Weight, r"given 0 tensors; .*from_float"),
    "a weight of a list": (lambda: int8fx.Int8Weight.from_float([[1.0]]), "given list; allowed"),
    "a weight of integers": (lambda: int8fx.Int8Weight.from_float(ONES.int()), r"torch\.int32"),
    "a weight of a vector": (lambda: int8fx.Int8Weight.from_float(ONES[0]), r"\[64\]; allowed"),
    "ways that are names": (
        lambda: int8fx.suggest(two(), ONES, budget={"kl": 1.0}, ways={"a": "w8a16"}),
        r"ways=\{'a': 'w8a16'\}; allowed",
    ),
    "a list of ways": (
        lambda: int8fx.suggest(two(), ONES, budget={"kl": 1.0}, ways=["w8a16"]),
        r"ways=\['w8a16'\]; allowed",
    ),
    "no scheme": (lambda: int8fx.SCHEMES["int8"], "'int8' is no scheme; there are 'llm.int8'"),
}


@pytest.mark.parametrize("misuse", MISUSED)
def test_what_is_misused_says_what_was_given_and_what_is_allowed(misuse):
    call, said = MISUSED[misuse]
    with pytest.raises((TypeError, ValueError, KeyError, UserError), match=said):
        call()


@pytest.mark.parametrize("options", [3, ["threshold"], "nowhere.json"], ids=str)
def test_options_that_are_none_are_named(options):
    with pytest.raises((ValueError, FileNotFoundError), match=r"allowed: a dict|nowhere\.json"):
        int8fx.explain(two(), torch.ones(1, 64), options=options)


def test_a_wrong_option_is_one_error_at_the_first_call():
    torch._dynamo.reset()
    compiled = torch.compile(two(), backend="llmint8", options={"treshold": 3})
    with pytest.raises(ValueError, match=r"^unknown option 'treshold' for backend 'llmint8'") as raised:
        compiled(torch.ones(1, 64))
    frames = [frame.name for frame in raised.traceback if "int8fx" in str(frame.path)]
    assert frames[-1] == "llmint8"
    assert len([each for each in raised.traceback if "torch/_dynamo" in str(each.path)]) <= 2


def test_a_calibration_of_another_model_is_one_error_at_the_first_call(tmp_path):
    torch._dynamo.reset()
    int8fx.calibrate(nn.Linear(64, 16), [torch.ones(2, 64)]).save(tmp_path / "other.json")
    options = {"scheme": "int8-rotated", "calibration": str(tmp_path / "other.json")}
    with pytest.raises(ValueError, match=r"^0: "):
        torch.compile(two(), backend="llmint8", options=options)(torch.ones(1, 64))
    with pytest.raises(ValueError, match=r"^0: "):
        int8fx.explain(two(), torch.ones(1, 64), options=options)


# --- options --------------------------------------------------------------------------------------


def test_a_type_checker_knows_every_option_of_quantize():
    settings = {name for scheme in int8fx.SCHEMES.values() for name in scheme.reads}
    assert typing.get_type_hints(QuantizeOptions).keys() >= settings | set(OPTIONS)
    assert "Unpack" in str(inspect.signature(int8fx.quantize_))
    assert inspect.signature(int8fx.quantize_).return_annotation is not nn.Module


def test_plus_adds_to_the_default_skip_list():
    added = int8fx.Options.parse({"skip": ["+0"]})
    assert added.skips_by_default and added.skip == (*int8fx.Options().skip, "0")
    assert added.unused(["1"]) == ("skip: '0'",)
    model = nn.ModuleDict({"fc": two(), "lm_head": nn.Linear(64, 64)})
    assert [each.path for each in int8fx.decisions(model, skip=["+fc.0"]) if each.accepted] == ["fc.2"]
    assert {each.path for each in int8fx.decisions(model, skip=["fc.0"]) if each.accepted} == {
        "fc.2",
        "lm_head",
    }


def test_options_are_read_from_a_file(tmp_path):
    options = {"threshold": 3.0, "skip": ["2"], "rules": [("0", "w8a16", {})]}
    save_options(options, tmp_path / "options.json")
    parsed = int8fx.Options.parse(tmp_path / "options.json")
    assert parsed == int8fx.Options.parse(options)
    torch._dynamo.reset()
    with int8fx.collect_reports() as reports:
        torch.compile(two(), backend="llmint8", options=str(tmp_path / "options.json"))(
            torch.ones(1, 64)
        )
    assert [each.scheme for each in reports[0].decisions] == ["w8a16", ""]


def test_a_calibration_in_a_file_is_seen_from_its_folder(tmp_path):
    int8fx.calibrate(two(), [torch.ones(2, 64)]).save(tmp_path / "c.json")
    save_options({"scheme": "int8-rotated", "calibration": "c.json"}, tmp_path / "options.json")
    assert int8fx.Options.parse(tmp_path / "options.json").calibration.rows == 2


def test_quantize_takes_rules_and_the_weights_keep_them():
    model = int8fx.quantize_(two(), rules=[("0", "w8a16-group", {"group_size": 32})])
    assert model[0].weight.options == {"scheme": "w8a16-group", "group_size": 32}
    assert model[2].weight.options["scheme"] == "llm.int8"


# --- patterns that match nothing ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"skip": ["+fc.atn.*"]}, r"skip: 'fc.atn.\*' .*; 'fc.attn.\*' matches 2"),
        ({"skip": ["fc.attn"]}, r"skip: 'fc.attn' .*; 'fc.attn.\*' matches 2"),
        ({"only": ["attn.*", "fc.*"]}, r"only: 'attn.\*' .*; '\*.attn.\*' matches 2"),
        ({"rules": [("encoder.*", "w8a16")]}, r"rules: 'encoder.\*' .*; the nearest: 'fc.attn"),
    ],
    ids=str,
)
@pytest.mark.parametrize("compiled", [False, True], ids=["quantize_", "compiled"])
def test_a_pattern_that_matches_nothing_warns_once_with_near_names(options, said, compiled):
    torch._dynamo.reset()
    model = nn.Sequential()
    model.add_module("fc", nn.Sequential())
    model.fc.add_module("attn", nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    model.requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if compiled:
            run = torch.compile(model, backend="llmint8", options=options, dynamic=False)
            run(torch.ones(2, 64))
            run(torch.ones(3, 64))
        else:
            int8fx.quantize_(model, **options)
    messages = [str(each.message) for each in caught if "matches no linear" in str(each.message)]
    assert len(messages) == 1
    assert re.search(said, messages[0]), messages[0]


@pytest.mark.parametrize("skip", [list(OUTPUT_HEADS), [*OUTPUT_HEADS, "1"]], ids=["default", "more"])
def test_the_default_list_written_out_does_not_warn(skip):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        int8fx.quantize_(model, skip=skip)


# --- how things print -----------------------------------------------------------------------------


def test_schemes_are_a_line_each():
    lines = repr(int8fx.SCHEMES).splitlines()
    assert [line.split()[0] for line in lines] == list(int8fx.SCHEMES)
    assert int8fx.SCHEMES._repr_html_().count("<tr>") == len(int8fx.SCHEMES) + 1


def test_a_report_is_a_few_lines_and_prints_whole():
    torch._dynamo.reset()
    model = two()
    with int8fx.collect_reports() as reports:
        torch.compile(model, backend="llmint8", options={"skip": ["<1>", "2"]})(torch.ones(2, 64))
    (report,) = reports
    assert repr(report).splitlines()[1:] == [" 1 left: skip: matches '2'>"]
    assert repr(report).startswith("<Report: 1 of 2 linears and matmuls in llm.int8")
    assert report._repr_html_().count("<tr>") == 3
    assert len(str(report).splitlines()) > len(repr(report).splitlines())


def test_a_report_says_in_which_schemes():
    torch._dynamo.reset()
    rules = {"rules": [("0", "w8a16-group", {"group_size": 32})]}
    with int8fx.collect_reports() as reports:
        torch.compile(two(), backend="llmint8", options=rules)(torch.ones(2, 64))
        torch.compile(two(), backend="llmint8", options={"skip": ["*"]})(torch.ones(2, 64))
    mixed, none = (each.headline for each in reports)
    assert mixed.startswith("2 of 2 linears and matmuls in w8a16-group and llm.int8, ")
    assert none.startswith("0 of 2 linears and matmuls quantised, ")


def test_a_suggestion_is_a_few_lines_and_shows_itself_in_a_notebook():
    suggestion = int8fx.suggest(two(), torch.randn(8, 64), budget={"kl": 1.0})
    assert len(repr(suggestion).splitlines()) == 3 and "2 in llm.int8" in repr(suggestion)
    assert suggestion._repr_html_().count("<tr>") == len(suggestion.linears) + 1


def test_a_quantised_module_prints_as_one_wherever_it_goes():
    model = int8fx.quantize_(two(), scheme="w8a16-group", group_size=32)
    said = f"bias=True, w8a16-group, 8 bits, {model[0].weight.int8_bytes:,} bytes)"
    assert said in repr(model) and said in repr(pickle.loads(pickle.dumps(model)))
    assert "w8a16" not in repr(int8fx.dequantize_(model))


def test_a_calibration_prints_in_a_line():
    calibration = int8fx.calibrate(two(), [torch.ones(5, 64)])
    assert repr(calibration) == "<Calibration of a Sequential: 2 linears, 5 rows>"
