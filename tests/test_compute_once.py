"""What every layer reads is computed once, and nothing else changes."""

import torch
from torch import nn

from int8fx.testing.support import compile_once

K, L = 16, 80


class Rotary(nn.Module):
    """Layers that read a cosine and a mask, both of positions."""

    def __init__(self, layers, dtype=torch.float32):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(K, K, bias=False) for _ in range(layers))
        self.register_buffer("inv_freq", 1.0 / 100 ** (torch.arange(K) / K))
        self.to(dtype)

    def forward(self, x, start):
        positions = torch.arange(x.shape[1], device=x.device) + start
        cos = (positions[:, None] * self.inv_freq).cos().to(x.dtype)
        mask = (positions[None] <= positions[:, None]).expand(x.shape[0], -1, -1)
        start.add_(1)  # a static cache counts so
        for layer in self.layers:
            x = x * cos.unsqueeze(0)
            x = layer(x) + torch.where(mask[:, :, :1], x, 0)
        return x


def run(layers, length=L, dtype=torch.float32):
    torch.manual_seed(0)
    model = Rotary(layers, dtype).requires_grad_(False)
    x, start = torch.randn(2, length, K, dtype=dtype), torch.tensor(3)
    y, report = compile_once(model, x, start)
    assert start == 4
    return y, model(x, torch.tensor(3)), report.graph


def test_what_every_layer_reads_is_computed_once(monkeypatch):
    monkeypatch.setattr("int8fx.passes.float.compute_once.ELEMENTS", 1000)
    y, expected, graph = run(4, dtype=torch.bfloat16)
    assert graph.count("int8fx.once") == 2  # cosine and mask
    assert (y - expected).norm() < 0.03 * expected.norm()


def test_what_few_read_or_is_small_is_left_to_inductor(monkeypatch):
    assert "int8fx.once" not in run(4, length=2)[2]
    monkeypatch.setattr("int8fx.passes.float.compute_once.ELEMENTS", 1000)
    assert "int8fx.once" not in run(3)[2]


def test_a_reader_may_write_into_it(monkeypatch):
    monkeypatch.setattr("int8fx.passes.float.compute_once.ELEMENTS", 100)

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(K, K)

        def forward(self, x, positions):
            scale = positions[:, None].cos().expand(-1, K) * 1.0
            y = [self.linear(x) * scale for _ in range(4)]
            scale.add_(1)
            return torch.stack(y), self.linear(x) * scale

    model, x = Writes().requires_grad_(False), torch.randn(20, K)
    (y, last), report = compile_once(model, x, torch.arange(20))
    assert "int8fx.once" in report.graph
    for got, expected in zip((y, last), model(x, torch.arange(20)), strict=True):
        assert (got - expected).norm() < 0.03 * expected.norm()


def test_a_value_with_a_gradient_is_left_alone(monkeypatch):
    monkeypatch.setattr("int8fx.passes.float.compute_once.ELEMENTS", 100)
    torch._dynamo.reset()

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(K, K).requires_grad_(False)
            self.frequency = nn.Parameter(torch.ones(K))

        def forward(self, x, positions):
            cos = (positions[:, None] * self.frequency).cos()
            return sum(self.linear(x * cos) for _ in range(5))

    model, x, positions = Scaled(), torch.randn(20, K), torch.arange(20)
    torch.compile(model, backend="llmint8", fullgraph=True)(x, positions).sum().backward()
    got, model.frequency.grad = model.frequency.grad, None
    model(x, positions).sum().backward()
    assert (got - model.frequency.grad).norm() < 0.05 * model.frequency.grad.norm()
