"""Ways to change a float weight: each takes a module with one ``weight``, and a call of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

LR = 2.0


class ThroughNumpy(torch.optim.Optimizer):
    """A stranger's optimizer: torch sees none of its writes."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                negate(parameter)


def negate(tensor: Tensor) -> None:
    """Through numpy, which has no bfloat16: by the bits."""
    integers = {2: torch.int16, 4: torch.int32}[tensor.itemsize]
    tensor.detach().view(integers).numpy()[:] ^= torch.iinfo(integers).min


def stepped(make: Callable[[list[Tensor]], Any], compiled: bool = False) -> Callable:
    def change(model: Any, call: Callable[[], Any]) -> None:
        weight = model.weight
        weight.grad = torch.randn_like(weight).sign()
        step = make([weight]).step
        (torch.compile(step, backend="aot_eager") if compiled else step)()
        weight.grad = None

    return change


def of_bitsandbytes(name: str, params: list[Tensor]) -> torch.optim.Optimizer:
    return getattr(pytest.importorskip("bitsandbytes").optim, name)(params, lr=LR)


def without_optimizer(model, call):
    with torch.no_grad():
        model.weight.data.add_(torch.randn_like(model.weight), alpha=-LR)


def in_place(model, call):
    with torch.no_grad():
        model.weight.mul_(-3)


def through_a_view(model, call):
    with torch.no_grad():
        model.weight.view(-1)[:].mul_(-3) if model.weight.is_contiguous() else model.weight.t().mul_(-3)


def load_state_dict(model, call):
    model.load_state_dict({"weight": torch.randn(model.weight.shape, dtype=model.weight.dtype)})


def another_parameter(model, call):
    model.weight = nn.Parameter(-2 * model.weight.detach())


def data_adds(model, call):
    model.weight.data += torch.randn_like(model.weight)


def data_replaced(model, call):
    model.weight.data = -2 * model.weight.data


def to_and_fro(model, call):
    # The freed address may be handed out again: same address, same version, other values.
    dtype = model.weight.dtype
    model.weight.data = (model.weight.data * -2).half()
    model.weight.data = model.weight.data.to(dtype)


def filled(model, call):
    model.weight.data.fill_(-1.5 * model.weight.data.flatten()[0])


def foreach(model, call):
    torch._foreach_mul_([model.weight.data], -3.0)


def numpy(model, call):
    negate(model.weight)


def dlpack(model, call):
    torch.from_dlpack(torch.to_dlpack(model.weight.detach())).mul_(-3)


def another_of_its_storage(model, call):
    with torch.no_grad():
        nn.Parameter(model.weight.data).mul_(-3)


def step_of_another_of_its_storage(model, call):
    stepped(lambda params: torch.optim.Adam(params, lr=LR, fused=True))(_Other(model.weight.data), call)


class _Other(nn.Module):
    def __init__(self, data: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(data)


def vector(model, call):
    vector_to_parameters(-2 * parameters_to_vector(model.parameters()), model.parameters())


def flat_buffer(model, call):
    flat = model.weight.data.flatten().clone()
    model.weight.data = flat.view(model.weight.shape)
    call()
    flat.mul_(-3)


def bank(model, call):
    weights = torch.stack([model.weight.data, -3 * model.weight.data])
    model.weight.data = weights[0]
    call()
    model.weight.data = weights[1]


def other_strides(model, call):
    shape = model.weight.shape
    flat = model.weight.data.flatten()
    model.weight.data = flat.view(shape)
    call()
    order = range(len(shape) - 1, -1, -1)
    model.weight.data = flat.view(shape[::-1]).permute(*order)


def data_(name: str, *args: Any) -> Callable:
    return lambda model, call: getattr(model.weight.data, name)(*args)


# Torch counts a version, or another storage, address, offset or shape tells of it.
COUNTED: dict[str, Callable] = {
    "mul_": in_place,
    "a view": through_a_view,
    "load_state_dict": load_state_dict,
    "another parameter": another_parameter,
    "data =": data_replaced,
    "data = there and back": to_and_fro,
    "vector_to_parameters": vector,
    "data = of a bank": bank,
    "data = with other strides": other_strides,
    "Adam": stepped(lambda params: torch.optim.Adam(params, lr=LR)),
}
# Torch's hook tells of them.
STEPS: dict[str, Callable] = {
    "fused AdamW": stepped(lambda params: torch.optim.AdamW(params, lr=LR, fused=True)),
    "fused Adam": stepped(lambda params: torch.optim.Adam(params, lr=LR, fused=True)),
    "fused SGD": stepped(lambda params: torch.optim.SGD(params, lr=LR, fused=True)),
    "fused Adagrad": stepped(lambda params: torch.optim.Adagrad(params, lr=LR, fused=True)),
    "fused AdamW, compiled": stepped(lambda p: torch.optim.AdamW(p, lr=LR, fused=True), compiled=True),
    "Adam in 8 bits": stepped(lambda params: of_bitsandbytes("Adam8bit", params)),
    "AdamW in 32 bits": stepped(lambda params: of_bitsandbytes("AdamW32bit", params)),
    "a stranger's optimizer": stepped(ThroughNumpy),
    "fused Adam of another parameter": step_of_another_of_its_storage,
}
# Only the content tells.
UNCOUNTED: dict[str, Callable] = {
    "without an optimizer": without_optimizer,
    "data +=": data_adds,
    "data.mul_": data_("mul_", -3),
    "data.neg_": data_("neg_"),
    "data.normal_": data_("normal_"),
    "data.copy_": lambda model, call: model.weight.data.copy_(torch.randn_like(model.weight)),
    "data.fill_": filled,
    "foreach on data": foreach,
    "numpy": numpy,
    "dlpack": dlpack,
    "another parameter of its storage": another_of_its_storage,
    "a flat buffer": flat_buffer,
}
CHANGES = COUNTED | STEPS | UNCOUNTED
