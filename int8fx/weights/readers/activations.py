"""An activation whose output AWQ divides by scales that belong to the linear behind it."""

import torch
from torch import Tensor, nn


class ScaledActivation(nn.Module):
    """``y = act(x) / scales``, of scales ``[K]``, one for each column.

    Its ``state_dict`` has ``scales``, as AWQ's files have it.
    """

    def __init__(self, act: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.act = act
        self.scales = nn.Parameter(scales, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) / self.scales.to(x.dtype)


def scale_activation(model: nn.Module, path: str, scales: Tensor) -> None:
    """Puts one in the place of the activation at ``path``."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(path)
    setattr(model.get_submodule(owner), name, ScaledActivation(module, scales.to(torch.float32)))
