"""A compiled graph in a file: Dynamo's ``aot_compile``, from which vLLM starts."""

import pickle

import pytest
import torch
from torch import nn

import int8fx
from int8fx.compiler.compiled_graph import CompiledGraph
from int8fx.compiler.swap import WeightSwap
from int8fx.testing import installed
from int8fx.weights.store import STORE

MODEL = """
import torch, int8fx
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

torch.manual_seed(0)
model = int8fx.quantize_(Model().eval().requires_grad_(False))
x = torch.randn(5, 64)
"""
SAVE = """
# Without guards, as vLLM does: torch cannot read back those of a weight that is a tensor subclass.
settings = {"fullgraph": True, "options": {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}}
with torch.no_grad(), torch._dynamo.config.patch(enable_aot_compile=True):
    compiled = torch.compile(model.forward, backend="llmint8", **settings).aot_compile(((x,), {}))
    torch.save(compiled(model, x), "y.pt")
compiled.save_compiled_function("graph")
"""
LOAD = """
with torch.no_grad(), int8fx.collect_reports() as reports, open("graph", "rb") as file:
    loaded = torch.compiler.load_compiled_function(file)
    assert loaded(model, x).equal(torch.load("y.pt"))
    with torch.no_grad():
        model.up.weight.copy_(model.up.weight.dequantize() * 2)
    assert not loaded(model, x).equal(torch.load("y.pt"))
assert reports == []
"""


def test_another_process_runs_it_and_compiles_nothing(tmp_path):
    """With the weights that the model has at each call."""
    environment = installed.install(tmp_path)
    for code in (SAVE, LOAD):
        done = installed.run(MODEL + code, environment)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def graph():
    """A ``CompiledGraph`` of a model, by whether its weight is int8."""

    def make(quantized):
        model = nn.Sequential(nn.Linear(64, 32)).eval().requires_grad_(False)
        if quantized:
            int8fx.quantize_(model)
        kept = []

        def backend(gm, inputs):
            kept.append(int8fx.llmint8(gm, inputs))
            return kept[-1]

        with torch.no_grad():
            torch.compile(model, backend=backend)(torch.randn(3, 64))
        return kept[0]

    return make


def test_weights_in_float_are_not_saved(graph):
    with pytest.raises(RuntimeError, match="1 of 1 weights are quantised by this graph"):
        CompiledGraph.serialize_compile_artifacts(graph(False))


def test_what_inductor_did_not_compile_is_not_saved():
    interpreted = CompiledGraph(WeightSwap([], [], STORE), lambda *args: args)
    with pytest.raises(RuntimeError, match=r"where torch\.compile\(f\)\.aot_compile made it"):
        CompiledGraph.serialize_compile_artifacts(interpreted)


def test_files_of_other_sources_are_refused():
    """Packed weights differ from kernel to kernel, and code from version to version."""
    saved = pickle.dumps({"made by": ("int8fx-0123", "another kernel")})
    with pytest.raises(RuntimeError, match=r"was written by \('int8fx-0123', 'another kernel'\)"):
        CompiledGraph.deserialize_compile_artifacts(saved)
