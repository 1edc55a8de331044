"""vLLM in this process, on small models: what the tests of ``int8fx.integrations.vllm`` share.

Needs vLLM for a CPU, beside torch (``.ci/nightly-serving`` makes such an environment).
"""

import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from int8fx.analysis.calibrate import calibrate
from int8fx.kernels.ops.quantize_reference import quantize_weight
from int8fx.testing.toy_llama import words
from int8fx.weights.quantize import quantize_

# One thread, no NUMA: engines come and go in one process. vLLM reads these when it is imported.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, there was",
    "Water boils at",
    "The three laws of motion are",
    "To bake bread, you need",
    "In 1969, people",
    "A prime number is",
)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 3
START = 300.0  # seconds that a server may take; most of it is Inductor's
Answer = tuple[tuple[int, float], ...]


def tiny_llama(**changed: Any) -> LlamaForCausalLM:
    """Of random weights, with heads of a width that vLLM has a kernel for, and some outliers."""
    shapes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 63,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shapes | changed)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 or name.endswith("bias"):
            parameter.data.normal_(0, 0.15)
        elif "layernorm" in name:
            parameter.data[:3] = 6.0  # most activations of these columns are outliers
    return model.to(torch.bfloat16)


def save(model: Any, folder: Path) -> Path:
    """The model and a tokenizer, as vLLM opens them."""
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def calibrated(model: Any, file: Path) -> Path:
    """The file of a calibration of a model of transformers."""
    tokens = torch.randint(0, 63, (2, 32), generator=torch.Generator().manual_seed(0))
    calibrate(model, [tokens]).save(file)
    return file


def of_bitsandbytes(source: Path, folder: Path) -> Path:
    """The same model as bitsandbytes writes it in 8-bit."""

    def entries(key: str, w_int8: Tensor, w_scale: Tensor) -> dict[str, Tensor]:
        owner = key.removesuffix("weight")
        layout = torch.tensor(0, dtype=torch.uint8)
        return {key: w_int8, f"{owner}SCB": w_scale * 127, f"{owner}weight_format": layout}

    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
    return _rewritten(source, folder, entries, config)


def of_compressed_tensors(source: Path, folder: Path) -> Path:
    """The same model as llm-compressor writes it in W8A8, with a scale per token found at run time."""

    def entries(key: str, w_int8: Tensor, w_scale: Tensor) -> dict[str, Tensor]:
        return {key: w_int8, f"{key}_scale": w_scale.unsqueeze(1)}

    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    return _rewritten(source, folder, entries, config)


def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct, fetched if it is not there."""
    from rich.console import Console

    from int8fx.bench.smollm2 import local_copy

    return local_copy(Console(stderr=True))


def in_every_form(source: Path, folder: Path) -> dict[str, Path]:
    """A model in bf16, and in the int8 formats that vLLM serves, by the names of these. What is in the
    folder already stays, of whatever model it is."""
    names = ("bf16", "int8fx", "bitsandbytes", "compressed-tensors")
    files = {name: folder / name for name in names}
    if all((each / "model.safetensors").is_file() for each in files.values()):
        return files
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.save_pretrained(files["bf16"])
    quantize_(model, decomposition="token")
    model.save_pretrained(files["int8fx"])
    for name in ("bf16", "int8fx"):
        tokenizer.save_pretrained(files[name])
    of_bitsandbytes(files["bf16"], files["bitsandbytes"])
    of_compressed_tensors(files["bf16"], files["compressed-tensors"])
    return files


def _rewritten(source: Path, folder: Path, entries: Any, quantization: dict[str, Any]) -> Path:
    shutil.copytree(source, folder)
    state: dict[str, Tensor] = {}
    for key, weight in load_file(source / "model.safetensors").items():
        is_linear = key.endswith(".weight") and key.split(".")[-2] in LINEARS
        state |= entries(key, *quantize_weight(weight)) if is_linear else {key: weight}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


@contextmanager
def engine(model: Path, **settings: Any) -> Iterator[Any]:
    """A ``vllm.LLM`` of the model, gone at the end."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    limits = {"max_model_len": 256, "max_num_seqs": 16, "disable_log_stats": True}
    llm = None
    try:
        llm = LLM(str(model), **limits | settings)
        yield llm
    finally:  # after a start that failed as well
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        torch.compiler.reset()
        cleanup_dist_env_and_memory()


@contextmanager
def server(
    command: Sequence[str], log: Path, environment: Mapping[str, str], ends: bool = True
) -> Iterator[str]:
    """The address of an OpenAI-compatible server on loopback; Ctrl-C ends it at the end.

    Args:
        command: without host and port.
        log: where its output goes.
        environment: what differs from that of this process.
        ends: whether Ctrl-C ends it; if not, it is killed.

    Raises:
        AssertionError: it ended by itself, did not answer, or did not end with exit code 0.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    whole = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            whole, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, address, log)
        yield address
        if ends:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait(process: Any, address: str, log: Path) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no answer after {START} s\n{log.read_text()[-3000:]}")


def answers(llm: Any, prompts: Sequence[Sequence[int]], tokens: int = 16) -> list[Answer]:
    """What each prompt is answered, all of them at once: tokens, with their log-probabilities."""
    from vllm import TokensPrompt

    given = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
    return [answer_of(each) for each in llm.generate(given, greedy(tokens), use_tqdm=False)]


def interleaved(
    llm: Any, prompts: Sequence[Sequence[int]], random_: random.Random, tokens: int = 16
) -> list[Answer]:
    """The same where each request comes at a random step, while others are being answered."""
    waiting = list(enumerate(prompts))
    random_.shuffle(waiting)
    found: dict[str, Answer] = {}
    while waiting or llm.llm_engine.has_unfinished_requests():
        for _ in range(random_.randrange(4)):
            if waiting:
                number, prompt = waiting.pop()
                llm.llm_engine.add_request(
                    str(number), {"prompt_token_ids": list(prompt)}, greedy(tokens)
                )
        for output in llm.llm_engine.step():
            if output.finished:
                found[output.request_id] = answer_of(output)
    return [found[str(number)] for number in range(len(prompts))]


def greedy(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1)


def answer_of(output: Any) -> Answer:
    (completion,) = output.outputs
    return tuple(
        (token, ranked[token].logprob)
        for token, ranked in zip(completion.token_ids, completion.logprobs, strict=True)
    )


def gaps(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """How far each token of an answer is below the largest logit that a model of transformers has after
    the same words, fp32: 0 where it chooses the same."""
    words_ = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = model(words_).logits[0, len(prompt) - 1 : -1].float()
    return logits.amax(1) - logits[torch.arange(len(answer)), torch.tensor(answer)]


def random_prompts(count: int, random_: random.Random) -> list[list[int]]:
    """Of 1 to 90 words, some with a beginning in common."""
    shared = [random_.randrange(63) for _ in range(40)]
    found = []
    for number in range(count):
        own = [random_.randrange(63) for _ in range(random_.randrange(1, 50))]
        found.append(shared + own if number % 3 == 0 else own)
    return found
