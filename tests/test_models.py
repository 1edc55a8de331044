"""A sample of transformers' architectures at toy size; benchmarks/coverage.py has all of them.

Every int8 linear of each is compared with float64 inside the derived bound, and graph breaks with
those of a backend that compiles nothing. Some are compiled with Inductor as well.
"""

import pytest
import torch

from int8fx.kernels import packing
from int8fx.testing.checked import checking
from int8fx.testing.toy_models import build
from int8fx.torch_private import compile_counts

# Varied on purpose: decoders, encoders, both; vision, audio, several at once; mixtures of experts,
# state spaces, sliding windows, Conv1D, packed projections, biases and none, tied heads and not.
SAMPLE = (
    "llama gpt2 gemma3_text qwen3 phi3 gpt_neox opt mamba mixtral bloom "
    "bert deberta-v2 modernbert xlnet "
    "flan-t5 bart pegasus "
    "vit segformer dinov2 "
    "whisper wav2vec2 "
    "clip blip siglip"
).split()
COMPILED = "bert flan-t5 blip".split()
REASONS = (
    "both operands are activations",
    "skip: ",
    "its projections are inside one fused call of torch",  # siglip
    "the weight is an activation, computed from parameters alone (einsum",  # xlnet's positions
    "beta=",  # bloom's attention scores, of two activations
)


@pytest.fixture(scope="module")
def toys():
    """Toys built once; their outputs are eager's."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = build(name)
        return built[name]

    return get


def run(toy, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    with torch.no_grad():
        y = torch.compile(toy.model, backend=backend)(**toy.inputs)
    return y, compile_counts()


@pytest.mark.parametrize("name", SAMPLE)
def test_every_linear_is_within_the_bound_and_no_graph_breaks(toys, name):
    toy = toys(name)
    _, expected = run(toy, "eager")
    with checking(exact=True) as seen:
        y, counts = run(toy, "llmint8")
    assert counts == expected
    assert seen.linears > 0
    # With exact products in the int8 linears' place nothing differs: the graph is the model's.
    torch.testing.assert_close(y[0], toy.expected[0], rtol=1e-3, atol=1e-4)
    assert seen.worst <= 1, f"{seen.worst_call}: {seen.worst:.2f} of its bound"
    refused = [decision for decision, _ in seen.flops if not decision.accepted]
    assert all(decision.reason.startswith(REASONS) for decision in refused), refused


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_computes_what_the_checked_graph_does(toys, name):
    toy = toys(name)
    with checking(exact=True) as interpreted:
        run(toy, "llmint8")
    with checking(exact=True, inductor=True) as seen:
        y, _ = run(toy, "llmint8")
    assert seen.linears == interpreted.linears > 0
    assert seen.worst <= 1, f"{seen.worst_call}: {seen.worst:.2f} of its bound"
    torch.testing.assert_close(y[0], toy.expected[0], rtol=1e-3, atol=1e-4)


def test_the_check_can_fail(monkeypatch):
    pack = packing.pack

    def halved(weight_format, stored, N, K):
        w_int8, w_scale = stored
        return pack(weight_format, (w_int8, w_scale * 0.5), N, K)

    monkeypatch.setattr(packing, "pack", halved)
    with checking() as seen:
        run(build("bert"), "llmint8")
    assert seen.worst > 1
