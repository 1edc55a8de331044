"""``transformers serve`` on files in int8, as ``docs/serve.md`` shows it, on loopback."""

import json
import sys
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM

import int8fx
from int8fx.testing import serving

QUESTION = "w1 w2"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    quantized = int8fx.quantize_(serving.tiny_llama(), decomposition="token")
    return serving.save(quantized, tmp_path_factory.mktemp("models") / "int8")


def ask(address, files, **more):
    message = {"role": "user", "content": QUESTION}
    question = {"model": str(files), "messages": [message], "temperature": 0, "max_tokens": 8, **more}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


@pytest.mark.parametrize("options", [[], ["--continuous-batching"]], ids=["plain", "continuous"])
def test_a_session(files, tmp_path, options):
    module = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", module, "serve", str(files), "--device", "cpu", *options]
    if options:
        command += ["--cb-block-size", "16", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]
    # With continuous batching, transformers 5.19 did not end by Ctrl-C within a minute.
    ends, environment = not options, {"HF_HUB_OFFLINE": "1"}
    with serving.server(command, tmp_path / "log", environment, ends) as address:
        answer = ask(address, files)
        assert answer["choices"][0]["message"]["content"] == expected(files)


def expected(files):
    """What the same files answer in this process."""
    model = AutoModelForCausalLM.from_pretrained(files, dtype=torch.bfloat16)
    words = serving.words()
    given = words.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.generate(**given, max_new_tokens=8, do_sample=False)
    return words.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
