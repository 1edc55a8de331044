"""The backend by its name in accelerate and in the Trainer of transformers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import int8fx
from int8fx.testing.support import Mlp

accelerate = pytest.importorskip("accelerate")

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import DynamoBackend, TorchDynamoPlugin  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

K, N = 32, 48


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Without what one Accelerator leaves for the next one in a process."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    torch._dynamo.reset()
    yield
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    GradientState._reset_state()


@pytest.fixture
def x():
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1))


class Frozen(nn.Module):
    """A frozen body and a trainable head, with the loss that the Trainer asks for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = Mlp(K, N).requires_grad_(False)
        self.head = nn.Linear(K, 2)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def accepted(reports):
    return [[decision.path for decision in report.accepted] for report in reports]


def test_the_plugin_takes_the_name_and_the_options(x):
    plugin = TorchDynamoPlugin(backend="llmint8", options={"skip": ["down"]})
    assert plugin.to_kwargs() == {"backend": "llmint8", "options": {"skip": ["down"]}}
    model = Accelerator(cpu=True, dynamo_plugin=plugin).prepare(Mlp(K, N))
    with torch.no_grad(), int8fx.collect_reports() as reports:
        model(x)
    assert accepted(reports) == [["up"]]


def test_the_backend_is_a_member_as_the_others_are():
    backend = DynamoBackend("LLMINT8")
    assert str(backend) == backend == backend.value == "LLMINT8"
    assert "LLMINT8" in DynamoBackend and backend != DynamoBackend.INDUCTOR
    assert pickle.loads(pickle.dumps(backend)) is copy.deepcopy(backend) is backend
    with pytest.raises(ValueError, match="'LLMINT4' is not a valid DynamoBackend"):
        DynamoBackend("LLMINT4")


def trainer(model, folder, **options):
    arguments = TrainingArguments(
        folder, use_cpu=True, report_to=[], max_steps=2, disable_tqdm=True, **options
    )
    data = [{"x": torch.randn(K), "labels": torch.tensor(index % 2)} for index in range(8)]
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


def test_the_trainer_takes_the_name(tmp_path):
    model = Frozen()
    made = trainer(model, tmp_path, torch_compile_backend="llmint8")
    before = model.head.weight.detach().clone()
    with int8fx.collect_reports() as reports:
        made.train()
    assert accepted(reports) == [["body.up", "body.down"]]  # the trainable head stays in float
    assert not torch.equal(model.head.weight, before)


def test_the_trainer_evaluates_in_int8_what_is_compiled_in_place(tmp_path):
    """Compiled by its name, the Trainer runs the model uncompiled for an evaluation after training."""
    model = Frozen()
    model.compile(backend="llmint8", options={"skip": ["head"]})
    made = trainer(model, tmp_path)
    for run in (made.train, made.evaluate):
        with int8fx.collect_reports() as reports:
            run()
        assert accepted(reports) == [["body.up", "body.down"]]
