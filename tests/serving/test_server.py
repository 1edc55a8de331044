"""What ``docs/serve.md`` shows: an OpenAI-compatible session, on loopback, from start to Ctrl-C."""

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from int8fx.testing import serving


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """The address of a server, which is stopped at the end as a user stops it."""
    cache = tmp_path_factory.mktemp("cache")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--quantization", "int8fx", "--served-model-name", "tiny", "--max-model-len", "256"]
    environment = {**serving.ENVIRONMENT, "VLLM_CACHE_ROOT": str(cache)}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with serving.server(command, cache / "log", environment) as address:
        yield address
    assert "int8fx: compiled by 'llmint8' in mode 2" in (cache / "log").read_text()


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none")


def question(number):
    message = {"role": "user", "content": f"w{number} w{number + 1}"}
    return {"model": "tiny", "messages": [message], "temperature": 0, "max_tokens": 16}


def ask(client, number):
    return client.chat.completions.create(**question(number)).choices[0].message.content


def test_curl(server):
    """The request that curl sends."""
    request = urllib.request.Request(
        f"{server}/v1/chat/completions",
        data=json.dumps(question(1)).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] > 0


def test_a_stream_is_the_whole_answer(client):
    chunks = client.chat.completions.create(**question(3), stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == ask(client, 3)


def test_sixteen_at_once(client):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda number: ask(client, number), range(16)))
    assert all(answers)
    assert len(set(answers)) > 1
