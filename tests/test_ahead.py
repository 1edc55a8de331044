"""Artefacts of ``int8fx compile``: transformers' tokens, from a process without a compiler."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import int8fx
import int8fx.cli.app
from int8fx import torch_private
from int8fx.ahead.artefact import MANIFEST, WEIGHTS
from int8fx.ahead.compile import compile_model
from int8fx.ahead.mapped import ALIGNMENT, MappedFile, write_file
from int8fx.errors import ArtefactError, UserError
from int8fx.testing import toy_llama

pytestmark = pytest.mark.skipif(
    torch_private.release() < torch_private.AHEAD, reason="an artefact needs a newer torch"
)
ROOT = Path(__file__).parents[1]
CONTEXT = 64
PROMPTS = [[5], [3, 5], [3, 5, 7, 9, 11], list(range(1, 41))]
NEW = 12


def new_toy():
    """Of two layers, so that the passes find what layers share; no token ends a text."""
    return toy_llama.tiny(
        vocab_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


@pytest.fixture(scope="module")
def toy():
    return new_toy()


@pytest.fixture(scope="module")
def artefact(toy, tmp_path_factory):
    """The folder of the toy."""
    folder = tmp_path_factory.mktemp("ahead") / "toy"
    with torch.no_grad():
        compile_model(toy, toy_llama.words(), folder, context=CONTEXT)
    return folder


@pytest.fixture(scope="module")
def expected(toy):
    """What transformers generates with the compiled model, by prompt."""
    torch.compiler.reset()  # what other tests compiled of transformers' forward counts against a limit
    compiled = new_toy()
    compiled.load_state_dict(toy.state_dict())
    compiled.compile(backend="llmint8")
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            texts = compiled.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
        found.append(texts[0, len(prompt) :].tolist())
    return found


@pytest.fixture
def copied(artefact, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(artefact, tmp_path / "copied"))


# --- What it generates ---------------------------------------------------------------------------


def test_tokens_are_those_of_the_compiled_model(artefact, expected):
    model = int8fx.load(artefact)
    found = [list(model.tokens(prompt, max_new_tokens=NEW)) for prompt in PROMPTS]
    assert found == expected


# Blocks what a machine that only runs artefacts need not have.
ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "torch", "torchgen", "sympy", "triton"):
            raise ModuleNotFoundError(f"{name} is blocked")

import importlib.util
torch = importlib.util.find_spec("torch")  # where its libraries are
sys.meta_path.insert(0, Blocked())
others = importlib.util.find_spec
importlib.util.find_spec = lambda name: torch if name == "torch" else others(name)
"""


def alone(code: str, folder: Path) -> str:
    """What Python code prints in a process without a compiler, torch's Python or transformers."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "CXX": "/nonexistent", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE + code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_process_needs_no_compiler_no_transformers_and_no_import_of_torch(
    artefact, expected, tmp_path
):
    code = f"""
import int8fx_run
model = int8fx_run.load({str(artefact)!r})
print([list(model.tokens(prompt, max_new_tokens={NEW})) for prompt in {PROMPTS}])
assert "torch" not in sys.modules
"""
    assert json.loads(alone(code, tmp_path)) == expected


def test_torch_may_be_imported_afterwards(artefact, expected, tmp_path):
    """And int8fx is whole then: its operators were defined without Python before."""
    code = f"""
import int8fx_run
model = int8fx_run.load({str(artefact)!r})
first = list(model.tokens({PROMPTS[2]}, max_new_tokens={NEW}))
import torch, int8fx
weight = int8fx.Int8Weight.from_float(torch.randn(32, 64))
torch.nn.functional.linear(torch.randn(2, 64), weight)
print([first, list(model.tokens({PROMPTS[3]}, max_new_tokens={NEW}))])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected[2:]


def test_a_conversation_goes_on_from_what_the_cache_has(artefact):
    """And gives what the whole text gives from an empty cache."""
    model, fresh = int8fx.load(artefact), int8fx.load(artefact)
    first = list(model.tokens(PROMPTS[2], max_new_tokens=4))
    longer = [*PROMPTS[2], *first, 8, 9]
    assert list(model.tokens(longer, max_new_tokens=6)) == list(fresh.tokens(longer, max_new_tokens=6))
    # A text that branches off drops what it has not in common.
    other = [*PROMPTS[2][:3], 20, 21]
    assert list(model.tokens(other, max_new_tokens=6)) == list(fresh.tokens(other, max_new_tokens=6))


def test_drawn_tokens_follow_temperature_top_p_and_seed(artefact):
    model = int8fx.load(artefact)
    prompt, how = PROMPTS[2], {"max_new_tokens": 30}
    greedy = list(model.tokens(prompt, **how))
    drawn = [list(model.tokens(prompt, temperature=5.0, seed=seed, **how)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert greedy not in drawn
    # So small a share leaves the most likely token alone.
    assert list(model.tokens(prompt, temperature=5.0, top_p=1e-6, **how)) == greedy


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.9), (1.0, 0.3)])
def test_tokens_are_drawn_by_their_probabilities(artefact, temperature, top_p):
    """By quantiles of the uniform number: the shares of the tokens, as softmax gives them."""
    model = int8fx.load(artefact)
    list(model.tokens(PROMPTS[2], max_new_tokens=1))
    program = model._programs["prefill"]
    count = 2000
    drawn = [program.sampled(temperature, top_p, (i + 0.5) / count) for i in range(count)]
    found = torch.bincount(torch.tensor(drawn), minlength=64) / count
    share = (torch.tensor(list(program.logits)).double() / temperature).softmax(0)
    ordered, order = share.sort(descending=True, stable=True)
    kept = ordered.cumsum(0) - ordered < top_p
    wanted = torch.zeros_like(share).index_copy_(0, order, torch.where(kept, ordered, 0))
    wanted /= wanted.sum()
    # Of a share between two quantiles one more or one fewer is drawn.
    assert (found - wanted).abs().max() <= 1 / count


def test_generation_stops_at_the_end_of_the_cache(artefact):
    model = int8fx.load(artefact)
    prompt = list(range(1, 41))
    found = list(model.tokens(prompt, max_new_tokens=1000))
    # What comes after the last token that the cache holds is known, and no step follows it.
    assert len(prompt) + len(found) == CONTEXT + 1


def test_generation_stops_at_a_token_that_ends_a_text(copied, expected):
    change(copied, lambda values: values.update(stop=[expected[2][3]]))
    assert list(int8fx.load(copied).tokens(PROMPTS[2], max_new_tokens=NEW)) == expected[2][:3]


@pytest.mark.parametrize(
    ("prompt", "how", "words"),
    [
        ([], {}, "at least one token"),
        ([1] * CONTEXT, {}, f"a prompt of {CONTEXT} tokens"),
        ([64], {}, "from 0 to 63"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0: allowed are whole numbers from 1"),
        ([1], {"temperature": -1.0}, "temperature=-1.0: allowed are numbers from 0"),
        ([1], {"top_p": 0.0}, "top_p=0.0: allowed are numbers above 0"),
    ],
)
def test_what_is_not_allowed_is_named(artefact, prompt, how, words):
    with pytest.raises(UserError, match=words):
        int8fx.load(artefact).tokens(prompt, **how)


def test_a_model_generates_one_text_at_a_time(artefact):
    model = int8fx.load(artefact)
    first = model.tokens(PROMPTS[2])
    next(first)
    next(model.tokens(PROMPTS[3]))
    with pytest.raises(UserError, match="another text was begun"):
        next(first)


def test_another_architecture_with_biases_and_another_scheme(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def new_model():
        torch.manual_seed(0)
        config = Qwen2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        return Qwen2ForCausalLM(config).eval()

    options, prompt = {"scheme": "int8-rotated"}, PROMPTS[2]
    compile_model(new_model(), toy_llama.words(), tmp_path / "qwen", context=CONTEXT, options=options)
    compiled = new_model()
    compiled.compile(backend="llmint8", options=options)
    with torch.no_grad():
        texts = compiled.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
    found = list(int8fx.load(tmp_path / "qwen").tokens(prompt, max_new_tokens=NEW))
    assert found == texts[0, len(prompt) :].tolist()
    assert len(set(found)) > 2


# --- Text ----------------------------------------------------------------------------------------


def test_pieces_add_up_to_the_text(artefact):
    model = int8fx.load(artefact)
    prompt = "w3 w5 w7 w9 w11"
    assert list(model.tokens(prompt, max_new_tokens=5)) == list(
        model.tokens(PROMPTS[2], max_new_tokens=5)
    )
    pieces = list(model.stream(prompt, max_new_tokens=NEW))
    assert "".join(pieces) == model.generate(prompt, max_new_tokens=NEW)
    assert len(pieces) > 3


def test_a_chat_is_written_by_the_models_template(artefact):
    model = int8fx.load(artefact)
    messages = [{"role": "user", "content": "w5 w6"}]
    whole = toy_llama.words().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answer = "".join(model.chat(messages, max_new_tokens=6))
    assert answer == int8fx.load(artefact).generate(whole, max_new_tokens=6)


def test_a_model_without_a_template_says_so(copied):
    change(copied, lambda values: values["chat"].pop("template"))
    with pytest.raises(UserError, match="no chat template"):
        int8fx.load(copied).chat([{"role": "user", "content": "w1"}])


# --- The command ---------------------------------------------------------------------------------


def command(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """The command ``int8fx``, as its console script starts it."""
    script = (
        f"import sys; sys.argv = ['int8fx', *{list(arguments)}]; from int8fx_run import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", f"{script}; assert 'torch' not in sys.modules"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=given,
        capture_output=True,
        text=True,
    )


def test_the_command_writes_what_follows_a_prompt(artefact):
    done = command("run", str(artefact), "w3 w5 w7", "--tokens", "6")
    assert done.returncode == 0, done.stderr
    assert done.stdout == int8fx.load(artefact).generate("w3 w5 w7", max_new_tokens=6) + "\n"
    assert f"Loading {artefact}" in done.stderr.replace("\n", "")


def test_the_command_talks_until_an_empty_line(artefact):
    """The second answer is to the whole conversation."""
    done = command("run", str(artefact), "--chat", "--tokens", "4", given="w5 w6\nw7\n\n")
    assert done.returncode == 0, done.stderr
    model, messages, shown = int8fx.load(artefact), [], ""
    for question in ("w5 w6", "w7"):
        messages.append({"role": "user", "content": question})
        answer = "".join(model.chat(messages, max_new_tokens=4))
        messages.append({"role": "assistant", "content": answer})
        shown += f"> {answer}\n"
    assert done.stdout == shown + "> "


def test_compiling_is_what_the_command_does(toy, tmp_path, capsys):
    """From files, which are those of transformers; the artefact's name and options are told."""
    toy.save_pretrained(tmp_path / "model")
    toy_llama.words().save_pretrained(tmp_path / "model")
    out, model = tmp_path / "out", str(tmp_path / "model")
    scheme = ["--scheme", "absmax-vector", "--dtype", "bfloat16", "--context", "32"]
    assert int8fx.cli.app.main(["compile", model, "--out", str(out), *scheme, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["linears"], told["context"]) == (model, 14, 32)
    loaded = int8fx.load(out)
    assert loaded.artefact.options == {"scheme": "absmax-vector"}
    assert loaded._weights.tensors["model.embed_tokens.weight"].dtype == "BF16"
    assert len(list(loaded.tokens([1, 2, 3], max_new_tokens=5))) == 5


# --- What does not run here ----------------------------------------------------------------------


def change(folder: Path, edit) -> None:
    """Edits the manifest of an artefact."""
    manifest = folder / MANIFEST
    values = json.loads(manifest.read_text())
    edit(values)
    manifest.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("torch", "2.9.1", "made for torch 2.9.1, and this is torch"),
        ("int8fx", "9.9.9", "made for int8fx 9.9.9, and this is int8fx"),
        ("architecture", "riscv64", "made for architecture riscv64"),
        ("instructions", ["avx2", "avx1024"], "a CPU with avx1024, which this one lacks"),
        ("format", 99, "format 99"),
    ],
)
def test_another_machine_or_torch_is_named(copied, name, value, words):
    change(copied, lambda values: values["made_by"].update({name: value}))
    with pytest.raises(ArtefactError, match=words):
        int8fx.load(copied)


@pytest.mark.parametrize("name", [WEIGHTS, "decode.so", "kernels.so", "runner.so", "tokenizer.json"])
def test_a_file_that_is_cut_off_is_named(copied, name):
    path = copied / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match=f"{name}: .*cut off"):
        int8fx.load(copied)


@pytest.mark.parametrize("name", ["prefill.so", "decode.so", "kernels.so", "runner.so"])
def test_code_that_was_changed_does_not_run(copied, name):
    path = copied / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=f"{name}: not as it was written"):
        int8fx.load(copied)


@pytest.mark.parametrize("name", [WEIGHTS, "decode.so", "tokenizer.json"])
def test_a_file_that_is_missing_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(ArtefactError, match=f"{name}: is not there"):
        int8fx.load(copied)


def test_a_folder_that_int8fx_did_not_write(tmp_path):
    with pytest.raises(ArtefactError, match="no folder that int8fx compile wrote"):
        int8fx.load(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ArtefactError, match=f"{MANIFEST}: damaged"):
        int8fx.load(tmp_path)


def others_write_the_folder(folder: Path) -> None:
    folder.chmod(0o777)


def others_write_the_code(folder: Path) -> None:
    (folder / "decode.so").chmod(0o666)


def a_link_to_code(folder: Path) -> None:
    library = folder / "decode.so"
    library.rename(folder / "elsewhere.so")
    library.symlink_to("elsewhere.so")


def code_of_another_user(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(folder / "decode.so", 12345, -1)


@pytest.mark.parametrize(
    ("done", "words"),
    [
        (others_write_the_folder, "can be written to by others"),
        (others_write_the_code, "can be written to by others"),
        (a_link_to_code, "symbolic link"),
        (code_of_another_user, "belongs to another user"),
    ],
)
def test_what_somebody_else_can_have_written_does_not_run(copied, done, words):
    done(copied)
    with pytest.raises(ArtefactError, match=f"{words}.*runs no code from there"):
        int8fx.load(copied)


# --- Weights -------------------------------------------------------------------------------------


def test_weights_are_mapped_and_not_copied(artefact):
    """The kernels read them where the file lies in memory."""
    model = int8fx.load(artefact)
    list(model.tokens(PROMPTS[3], max_new_tokens=2))
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if WEIGHTS in line]
    ranges = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
    assert ranges
    for memory in model._weights.tensors.values():
        assert any(start <= memory.address < end for start, end in ranges)
        assert memory.address % ALIGNMENT == 0


def test_a_weights_file_is_one_of_safetensors(tmp_path):
    from safetensors.torch import load_file

    tensors = {"a": torch.arange(5, dtype=torch.int8), "b": torch.randn(3, 2), "c": torch.tensor(7)}
    contents = {
        name: (kind, tuple(each.shape), each.reshape(-1).view(torch.uint8).numpy().data)
        for (name, each), kind in zip(tensors.items(), ("I8", "F32", "I64"), strict=True)
    }
    path = tmp_path / "w.safetensors"
    write_file(path, contents)
    read = load_file(path)
    assert all(torch.equal(read[name], each) for name, each in tensors.items())
    assert {name: each.shape for name, each in MappedFile(path).tensors.items() if name in tensors} == {
        name: tuple(each.shape) for name, each in tensors.items()
    }


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:6], "broken off in its header"),
        (lambda content: content[:-1], "broken off in"),
        (lambda content: content[:8] + b"?" + content[9:], "its header is damaged"),
        (lambda content: content.replace(b'"F32"', b'"F16"'), "damaged: a has 24 bytes, and needs 12"),
    ],
)
def test_a_damaged_weights_file_is_named(tmp_path, damage, words):
    path = tmp_path / "w.safetensors"
    write_file(path, {"a": ("F32", (3, 2), bytes(24))})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtefactError, match=words):
        MappedFile(path)


# --- What is not compiled ------------------------------------------------------------------------


def test_a_model_with_another_cache_is_refused(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        sliding_window=8,
    )
    model = MistralForCausalLM(config).eval()
    with pytest.raises(UserError, match=r"StaticSlidingWindowLayer.*keep the keys and values"):
        compile_model(model, toy_llama.words(), tmp_path / "out", context=CONTEXT)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_an_int8_linear_is_refused(toy, tmp_path):
    with pytest.raises(UserError, match="no linear of this model becomes int8"):
        compile_model(
            toy, toy_llama.words(), tmp_path / "out", context=CONTEXT, options={"skip": ["*"]}
        )


@pytest.mark.parametrize("context", [3, 129])
def test_a_cache_that_the_model_was_not_made_for_is_refused(toy, tmp_path, context):
    with pytest.raises(UserError, match=f"--context {context}: allowed are 4 to 128"):
        compile_model(toy, toy_llama.words(), tmp_path / "out", context=context)
