"""What older releases, and missing packages, lack: it is said, and names them."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import int8fx
from int8fx import torch_private
from int8fx.ahead.compile import compile_model
from int8fx.errors import UserError
from int8fx.testing import toy_llama
from int8fx.testing.installed import install, run

# Where these are not installed: what imports one of them anyway fails.
WITHOUT = """
import sys
for name in {names!r}:
    sys.modules[name] = None
"""
WITHOUT_TRANSFORMERS = """
import importlib.abc, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Finder())
"""
CORE = """
import torch, int8fx
from torch import nn
model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).requires_grad_(False)
x = torch.randn(4, 64)
y = model(x)
with int8fx.collect_reports() as reports:
    compiled = torch.compile(model, backend="llmint8")(x)
assert len(reports[0].accepted) == 2 and 0 < (compiled - y).norm() < 0.05 * y.norm()
assert len(int8fx.explain(model, x).rows) == 2
int8fx.save_checkpoint(int8fx.quantize_(model), "int8")
int8fx.load_checkpoint(model, "int8")
"""
OPTIONAL = (
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "gguf",
    "matplotlib",
    "peft",
    "tokenizers",
    "transformers",
    "triton",
    "typer",
)


def without(*names: str) -> str:
    return WITHOUT.format(names=names)


def test_the_core_needs_no_optional_package(tmp_path):
    done = run(without(*OPTIONAL) + CORE, install(tmp_path / "site"))
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_command_that_lacks_transformers_says_how_to_install_it(tmp_path):
    command = f"from int8fx.cli.app import main; sys.exit(main(['explain', {str(tmp_path)!r}]))"
    done = run(WITHOUT_TRANSFORMERS + command, install(tmp_path / "site"))
    assert done.returncode == 1
    assert "a model needs transformers: install with  " in done.stderr
    assert 'pip install "int8fx[transformers]"' in done.stderr
    assert "Traceback" not in done.stderr


# A release of transformers before 5.17 has no such module.
OLD_TRANSFORMERS = """
import importlib.metadata, sys
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
sys.modules["transformers.core_model_loading"] = None
version = importlib.metadata.version
importlib.metadata.version = lambda name: "4.57.6" if name == "transformers" else version(name)
"""


def test_files_of_int8_name_a_transformers_that_is_too_old_to_read_them(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    int8fx.quantize_(LlamaForCausalLM(config)).save_pretrained(tmp_path / "int8")
    read = f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'int8')!r})"
    done = run(OLD_TRANSFORMERS + read, install(tmp_path / "site"))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith(
        "ReleaseError: int8fx needs transformers >= 5.17.0, and this is transformers 4.57.6"
    )


def test_quantize_works_beside_a_transformers_that_cannot_save_it(tmp_path):
    code = """
import warnings
import int8fx, torch
warnings.simplefilter("error")
int8fx.quantize_(torch.nn.Sequential(torch.nn.Linear(32, 32)))
model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
)
try:
    int8fx.quantize_(model)
except UserWarning as warning:
    print(warning)
print(isinstance(model.model.layers[0].mlp.up_proj.weight, int8fx.Int8Weight))
"""
    done = run(OLD_TRANSFORMERS + code, install(tmp_path / "site"))
    assert done.returncode == 0, done.stderr[-2000:]
    said, kind = done.stdout.splitlines()
    assert said == (
        "int8fx needs transformers >= 5.17.0, and this is transformers 4.57.6: save_pretrained of "
        "LlamaForCausalLM cannot write int8 files here, and int8fx.save_checkpoint can"
    )
    assert kind == "True"


def test_a_compile_apart_runs_where_torch_cannot_isolate_it(monkeypatch):
    """torch 2.11 and 2.12 have no such argument."""
    compile_ = torch.compile

    def of_an_older_release(model, *, backend, dynamic):
        return compile_(model, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", of_an_older_release)
    apart = torch_private.compile_apart(nn.Linear(8, 8), "eager")
    assert apart(torch.randn(2, 8)).shape == (2, 8)


def test_an_artefact_needs_a_release_whose_cpp_compiles(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    with pytest.raises(UserError, match=r"needs torch >= 2\.13, and this is torch 2\.11\.0"):
        compile_model(toy_llama.tiny(), toy_llama.words(), tmp_path / "toy")
    assert not list(tmp_path.iterdir())
