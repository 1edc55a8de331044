"""Other int8 systems, each as a function that converts the linears of a model in place.

A peer that is not installed raises ``Missing``; ``pip install int8fx[bench]`` brings them all. The
output head stays as it is, as each of them would have it.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from int8fx.bench.linears import Missing

HEADS = ("lm_head",)

# They tell of kernels for other machines at every import, and of casts at every layer.
for name in ("bitsandbytes", "torchao"):
    logging.getLogger(name).setLevel(logging.ERROR)


def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every ``nn.Linear`` but the head, with the module that holds it and its name there."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] not in HEADS:
            parent, _, name = path.rpartition(".")
            yield model.get_submodule(parent), name, module


def bitsandbytes(model: nn.Module, *, threshold: float) -> nn.Module:
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise Missing("bitsandbytes") from error
    for parent, name, linear in linears(model):
        peer = bnb.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=threshold,
            device="meta",
        )
        weight = linear.weight.detach().to(torch.float16)
        peer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        peer.bias = linear.bias
        setattr(parent, name, peer.to("cpu"))
    return model.eval()


def torchao(model: nn.Module, *, config: str) -> nn.Module:
    try:
        from torchao import quantization
    except ImportError as error:
        raise Missing("torchao") from error

    def wanted(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and path.rpartition(".")[2] not in HEADS

    quantization.quantize_(model, getattr(quantization, config)(), wanted)
    return model


def quanto(model: nn.Module) -> nn.Module:
    try:
        from optimum.quanto import freeze, qint8, quantize
    except ImportError as error:
        raise Missing("optimum-quanto") from error
    quantize(model, weights=qint8, activations=None, exclude=[f"*{head}" for head in HEADS])
    freeze(model)
    return model


class _InFloat(nn.Module):
    """torch's dynamically quantised linear takes fp32 only; the rest of the model keeps its dtype."""

    def __init__(self, quantized: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantized, self.dtype = quantized, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quantized(x.float()).to(self.dtype)


def torch_dynamic(model: nn.Module) -> nn.Module:
    for parent, name, linear in linears(model):
        dtype = linear.weight.dtype
        one = nn.Sequential(linear.float())
        quantized = torch.ao.quantization.quantize_dynamic(one, {nn.Linear}, dtype=torch.qint8)
        setattr(parent, name, _InFloat(quantized, dtype))
    return model


def compiled(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, dynamic=False)


def as_it_is(model: nn.Module) -> Callable[..., Any]:
    return model


# How each is run, eager or compiled, after its conversion.
PEERS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module], Callable[..., Any]]]] = {
    "bitsandbytes 6.0": (partial(bitsandbytes, threshold=6.0), as_it_is),
    "bitsandbytes 6.0 compiled": (partial(bitsandbytes, threshold=6.0), compiled),
    "bitsandbytes 0.0": (partial(bitsandbytes, threshold=0.0), as_it_is),
    "torchao dynamic": (partial(torchao, config="Int8DynamicActivationInt8WeightConfig"), as_it_is),
    "torchao dynamic compiled": (
        partial(torchao, config="Int8DynamicActivationInt8WeightConfig"),
        compiled,
    ),
    "torchao weight-only": (partial(torchao, config="Int8WeightOnlyConfig"), as_it_is),
    "torchao weight-only compiled": (partial(torchao, config="Int8WeightOnlyConfig"), compiled),
    "quanto weight-only": (quanto, as_it_is),
    "torch dynamic": (torch_dynamic, as_it_is),
}


def converted(name: str) -> Callable[[nn.Module], Callable[..., Any]]:
    """What takes a model, converts it in place, and gives back what runs it."""
    convert, run = PEERS[name]
    return lambda model: run(convert(model))
