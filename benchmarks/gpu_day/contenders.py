"""Who is measured beside the bare kernels: compiled modules, and other packages where they are."""

import importlib.util
from collections.abc import Callable
from typing import Any

from gpu_day.process import Run
from gpu_day.rehearsal import compiles
from gpu_day.shapes import EPS, THRESHOLD, Layer, activation

OPTIONAL = ("bitsandbytes", "torchao")


def missing(name: str, find: Callable[[str], Any] = importlib.util.find_spec) -> str | None:
    """Why one of OPTIONAL is not compared, or None: it is."""
    return None if find(name) is not None else f"{name} is not installed, and not compared"


def block(torch: Any, layer: Layer, device: str) -> Any:
    """A norm and the linears that read it, in fp16."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.RMSNorm(layer.K, eps=EPS)
            self.linears = torch.nn.ModuleList(
                torch.nn.Linear(layer.K, N, bias=False) for N in layer.widths
            )

        def forward(self, x: Any) -> list[Any]:
            h = self.norm(x)
            return [linear(h) for linear in self.linears]

    return Block().to(device, torch.float16).requires_grad_(False).eval()


def compiled(run: Run, layer: Layer, M: int, way: str) -> Callable[[], Any]:
    """The block under llmint8, compiled for M rows."""
    import int8fx  # noqa: F401, which registers the backend

    torch = run.place.torch()
    torch.compiler.reset()  # or the recompiles of one forward() come to their limit
    model = block(torch, layer, run.place.device)
    options = {"decomposition": way}
    model = torch.compile(model, backend="llmint8", options=options, dynamic=False)
    return _first_called(run, model, activation(torch, M, layer.K, torch.float16))


def _first_called(run: Run, model: Any, x: Any) -> Callable[[], Any]:
    import torch

    with torch.no_grad(), compiles(run.rehearses):
        model(x)
    return lambda: model(x)


def optional_calls(run: Run, name: str, layer: Layer, M: int) -> dict[str, Callable[[], Any]]:
    """The block in another package's int8."""
    torch = run.place.torch()
    torch.compiler.reset()
    convert = {"bitsandbytes": _in_bitsandbytes, "torchao": _in_torchao}[name]
    model = convert(torch, block(torch, layer, run.place.device), run.place.device)
    x = activation(torch, M, layer.K, torch.float16)
    return {name: lambda: model(x)}


def _in_bitsandbytes(torch: Any, model: Any, device: str) -> Any:
    import bitsandbytes

    for index, linear in enumerate(model.linears):
        quantized = bitsandbytes.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=False,
            has_fp16_weights=False,
            threshold=THRESHOLD,
        )
        quantized.load_state_dict(linear.state_dict())
        model.linears[index] = quantized.to(device).eval()
    return model


def _in_torchao(torch: Any, model: Any, device: str) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model, mode="max-autotune", dynamic=False)
