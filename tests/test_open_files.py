"""int8 files in the hands of who does not know int8fx: a fresh process that imports nothing of it."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

import int8fx
from int8fx.integrations.transformers import Int8FxConfig
from int8fx.testing.installed import install, run
from int8fx.testing.toy_llama import of_one_layer, words

TOKENS = torch.arange(8).unsqueeze(0)

# What follows runs in the fresh process: it prints what came of each way to load, as JSON.
REPORT = """
import json, sys
imported = [name for name in ("torch", "transformers", "int8fx") if name in sys.modules]
def outcome(load):
    try:
        model = load()
        output = model(torch.arange(8).unsqueeze(0))
        y = output.logits if hasattr(output, "logits") else output.last_hidden_state
        return [type(model).__name__, str(y.dtype), y.flatten().tolist()]
    except Exception as error:
        return [type(error).__name__, str(error)]
"""
WAYS = """
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, pipeline
auto = AutoModelForCausalLM.from_pretrained
ways = {
    "plain": lambda: auto(path),
    "its class": lambda: LlamaForCausalLM.from_pretrained(path),
    "device_map cpu": lambda: auto(path, device_map="cpu"),
    "device_map auto": lambda: auto(path, device_map="auto"),
    "dtype": lambda: auto(path, dtype=torch.bfloat16),
    "torch_dtype": lambda: auto(path, torch_dtype="auto"),
    "low_cpu_mem_usage": lambda: auto(path, low_cpu_mem_usage=True),
    "ignore_mismatched_sizes": lambda: auto(path, ignore_mismatched_sizes=True),
    "subfolder": lambda: auto(above, subfolder="int8"),
    "revision": lambda: auto(path, revision="main"),
    "pipeline": lambda: pipeline("text-generation", model=path, tokenizer=path).model,
    "body": lambda: AutoModel.from_pretrained(path),
}
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return install(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of int8 files, ``int8``, and the model of which they are."""
    folder = tmp_path_factory.mktemp("saved")
    of_one_layer().bfloat16().save_pretrained(folder / "float")
    model = LlamaForCausalLM.from_pretrained(folder / "float", quantization_config=Int8FxConfig())
    model.save_pretrained(folder / "int8")
    return folder, model.eval()


@pytest.fixture(scope="module")
def tokenizer(saved):
    words().save_pretrained(saved[0] / "int8")


def outcomes(environment, saved, before="", chosen=None, **variables):
    """What the fresh process reports of each way to load."""
    folder, _ = saved
    code = f"above, path = {str(folder)!r}, {str(folder / 'int8')!r}\n{before}\n{REPORT}{WAYS}"
    code += f"chosen = {chosen!r} or ways\n"
    code += "print(json.dumps([imported, {name: outcome(ways[name]) for name in chosen}]))"
    done = run(code, environment, **variables)
    assert done.returncode == 0, done.stderr
    imported, results = json.loads(done.stdout.splitlines()[-1])
    return imported, results, done.stderr


def expected(model, way):
    with torch.no_grad():
        body = model.model(TOKENS).last_hidden_state
        y = body if way == "body" else model(TOKENS).logits
    name = "LlamaModel" if way == "body" else "LlamaForCausalLM"
    return [name, "torch.bfloat16", y.flatten().tolist()]


def test_every_way_to_load_gives_the_model_that_was_saved(environment, saved, tokenizer):
    imported, results, _ = outcomes(environment, saved)
    assert imported == []
    for way, result in results.items():
        assert result == expected(saved[1], way), way


BEFORE = {
    "from transformers.quantizers import HfQuantizer": {},  # which imports torch on its way
    "import torch, transformers.modeling_utils": {},
    "import int8fx": {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    "import transformers.modeling_utils, int8fx": {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
}


@pytest.mark.parametrize("before", BEFORE)
def test_whatever_is_imported_before(environment, saved, before):
    _, results, _ = outcomes(environment, saved, before, ["plain"], **BEFORE[before])
    assert results == {"plain": expected(saved[1], "plain")}


def test_where_nothing_tells_transformers_of_int8fx_the_files_do(environment, saved):
    """The same as where int8fx is not installed: an error that names it, whatever is allowed."""
    chosen = ["plain", "ignore_mismatched_sizes", "body", "device_map auto"]
    _, results, _ = outcomes(environment, saved, "", chosen, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    for way in chosen:
        kind, message = results[way]
        assert kind == "ValueError" and "int8 of int8fx; to read them, pip install int8fx" in message


def test_import_torch_imports_neither_int8fx_nor_transformers(environment):
    code = "import torch, sys; print([n for n in ('int8fx', 'transformers') if n in sys.modules])"
    done = run(code, environment)
    assert done.stdout == "[]\n" and done.stderr == ""


def test_import_torch_goes_on_when_registering_fails(environment):
    code = (
        "import int8fx_autoload\n"
        "int8fx_autoload.after_import = lambda *_: 1 / 0\n"
        "import torch; print(torch.ones(1))"
    )
    done = run(code, environment)
    assert done.stdout == "tensor([1.])\n"
    assert "int8fx could not register itself" in done.stderr and "ZeroDivisionError" in done.stderr


# --- libraries that call from_pretrained ----------------------------------------------------------


def test_sentence_transformers(environment, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    BertModel(BertConfig(**sizes, num_hidden_layers=1, vocab_size=64)).save_pretrained(
        tmp_path / "bert"
    )
    tokenizer = words()
    tokenizer.pad_token = tokenizer.eos_token  # sentences of a batch have one length
    tokenizer.save_pretrained(tmp_path / "bert")
    transformer = modules.Transformer(str(tmp_path / "bert"))
    model = sentence_transformers.SentenceTransformer(
        modules=[transformer, modules.Pooling(64)], device="cpu"
    )
    int8fx.quantize_(model)
    model.save(str(tmp_path / "int8"))
    code = (
        "from sentence_transformers import SentenceTransformer; import json\n"
        f"model = SentenceTransformer({str(tmp_path / 'int8')!r}, device='cpu')\n"
        "print(json.dumps(model.encode(['w3 w4', 'w5 w6 w7']).tolist()))"
    )
    done = run(code, environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == model.encode(["w3 w4", "w5 w6 w7"]).tolist()


LM_EVAL_TASK = """
task: toy
dataset_path: json
dataset_kwargs: {data_files: {test: "FILE"}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " {{target}}"
metric_list: [{metric: perplexity}]
"""


def test_lm_eval_on_the_command_line(environment, saved, tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    folder, model = saved
    (tmp_path / "texts.json").write_text('{"text": "w3 w4", "target": "w5"}\n')
    task = LM_EVAL_TASK.replace("FILE", str(tmp_path / "texts.json"))
    (tmp_path / "toy.yaml").write_text(task)
    given = ["--model", "hf", "--model_args", f"pretrained={folder / 'int8'}", "--device", "cpu"]
    given += ["--tasks", "toy", "--include_path", tmp_path, "--output_path", tmp_path / "results"]
    code = (
        f"import sys; sys.argv = ['lm-eval', *{[str(each) for each in given]!r}]\n"
        "from lm_eval.__main__ import cli_evaluate\n"
        "assert 'int8fx' not in sys.modules\n"
        "cli_evaluate()"
    )
    done = run(code, environment, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "results").rglob("results_*.json")
    measured = json.loads(file.read_text())["results"]["toy"]["perplexity,none"]
    with torch.no_grad():
        log_likelihood = model(torch.tensor([[3, 4]])).logits[0, -1].log_softmax(-1)[5]
    assert measured == pytest.approx(float(torch.exp(-log_likelihood.double())))
