"""Who asks for the backend and runs without one int8 linear is told, in processes of their own."""

import re

import pytest

from int8fx.testing.installed import install, run

LINEAR = "import torch; x, model = torch.randn(3, 32), torch.nn.Linear(32, 32); "
COMPILED = LINEAR + "compiled = torch.compile(model, backend='llmint8'{}); "
CALLED = COMPILED + "torch.no_grad().__enter__(); compiled(x)"

NO_GRAPH = 'no graph reached it.*model.compile\\(backend="llmint8"\\) compiles the model in place'
NONE_HERE = "llmint8 compiled a graph without one int8 linear:\n  1 x skip: matches '\\*'\n$"
NONE_AT_ALL = 'llmint8 compiled 1 graphs without one int8 linear; TORCH_LOGS="\\+int8fx"'
NOTHING = "^$"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return install(tmp_path_factory.mktemp("installed"))


CASES = {
    "never called": (COMPILED.format(""), NO_GRAPH),
    "a method of the wrapper": (
        "import torch\n"
        "class Model(torch.nn.Linear):\n"
        "    def encode(self, x): return self(x)\n"
        "torch.compile(Model(32, 32), backend='llmint8').encode(torch.randn(3, 32))",
        NO_GRAPH,
    ),
    "every linear is skipped": (CALLED.format(", options={'skip': ['*']}"), NONE_HERE),
    "weights require grad": (COMPILED.format("") + "compiled(x)", NONE_AT_ALL),
    "an int8 linear": (CALLED.format(""), NOTHING),
    "another backend": ("import int8fx; " + CALLED.replace("llmint8", "eager").format(""), NOTHING),
}


@pytest.mark.parametrize(("code", "said"), CASES.values(), ids=CASES)
def test_what_is_said(environment, code, said):
    done = run(code, environment)
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stderr, re.DOTALL), done.stderr


def test_an_exception_says_enough(environment):
    done = run(COMPILED.format("") + "raise KeyError('mine')", environment)
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'mine'\n")
