"""How int8 weights are written to a ``state_dict`` and read from one.

    weight          [1, N, K] int8: the shape of the parameter behind a one, the same on every device
    weight_scale    [N] fp32, one per output channel

They are plain tensors, for safetensors and for every other tool; loading packs them again. A float
``weight`` is quantised on loading; int8 values in the shape of the parameter, which we wrote before,
are read as well, and so are bitsandbytes' ``weight`` and ``SCB`` (``SCB`` = 127 · ``weight_scale``).

Why the one: nobody may take the integers for the values of a float weight, as torch and transformers
copy any number into a parameter of its shape, and tell of a scale that nothing reads in a warning at
most. Of another shape, ``load_state_dict`` refuses each int8 weight by name, strict or not, and
``from_pretrained`` the model. Another name instead would not do: transformers fills what it misses
with random numbers. It does so with another shape, too, if its caller asks for that, so the
configuration beside the files makes it refuse them (``int8fx/integrations/transformers.py``).

What does not fit raises ``CheckpointError`` before anything is loaded.

torch.distributed.checkpoint takes ``model.state_dict()``. Its ``get_model_state_dict`` does not, unless
the weights are in shards: it asks a module for an attribute of each name, and ``weight_scale`` is none.
Shards are written as the ``Int8Weight``s that they are (``int8fx/weights/sharding.py`` puts them
together).
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from int8fx import torch_private
from int8fx.errors import CheckpointError
from int8fx.kernels.ops.quantize_reference import QMAX
from int8fx.weights.tensor import Int8Weight

SCALE = "_scale"
# bitsandbytes keeps its scales beside the weight, under a name of its own.
BITSANDBYTES_SCALE = "SCB"
BITSANDBYTES_FORMAT = "weight_format"


def keys_beside(key: str) -> tuple[str, str, str]:
    """What may come with the int8 values under ``key``: our scales, or bitsandbytes' and its format."""
    owner = key.rpartition(".")[0]
    prefix = f"{owner}." if owner else ""
    return key + SCALE, prefix + BITSANDBYTES_SCALE, prefix + BITSANDBYTES_FORMAT


def attach(module: nn.Module) -> None:
    """Makes a module write and read its int8 weights in the form above."""
    module.register_state_dict_post_hook(_write)
    module.register_load_state_dict_pre_hook(_read)


def check_on_load(model: nn.Module) -> None:
    """Makes loading into a model check all of its tensors, once, before the first is changed."""
    if not checks_on_load(model):
        model.register_load_state_dict_pre_hook(check)


def checks_on_load(model: nn.Module) -> bool:
    return torch_private.reads_through(model, check)


def _int8_parameters(module: nn.Module) -> Iterator[tuple[str, Int8Weight]]:
    for name, weight in module.named_parameters(recurse=False):
        if isinstance(weight, Int8Weight):
            yield name, weight


# --- writing -------------------------------------------------------------------------------------


def _write(module: nn.Module, state: MutableMapping[str, Any], prefix: str, metadata: Any) -> None:
    for name, _ in _int8_parameters(module):
        weight = state.get(prefix + name)
        if isinstance(weight, Int8Weight):
            weight.check_readable(prefix + name)
            state.update(entries(prefix + name, weight))


def entries(key: str, weight: Int8Weight) -> dict[str, Tensor]:
    """What a ``state_dict`` holds of a weight."""
    # A copy of the scales, as the int8 values are: writers drop one of two names with the same memory.
    values = in_its_shape(weight.w_int8, weight).unsqueeze(0)
    return {key: values, key + SCALE: weight.w_scale.clone()}


def check_options(weights: Iterable[tuple[str, Tensor]], options: Mapping[str, Any]) -> None:
    """Whether files whose ``config.json`` holds ``options`` say what each weight is kept with.

    Raises:
        ValueError: names the first weight with others.
    """
    for name, weight in weights:
        if isinstance(weight, Int8Weight) and weight.activation_options != options:
            raise ValueError(
                f"{name} has {weight.activation_options}, and config.json holds one setting for all "
                f"weights, {options}; int8fx.save_checkpoint writes the weights alone"
            )


def in_its_shape(w_int8: Tensor, weight: Int8Weight) -> Tensor:
    """``w_int8 [N, K]`` in the shape of the parameter; and back."""
    return w_int8.t().contiguous() if weight.transposed else w_int8


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """The part of a ``state_dict`` that belongs to one int8 weight."""

    key: str
    weight: Int8Weight
    state: Mapping[str, Any]

    @property
    def value(self) -> Any:
        """In the shape that the parameter should have."""
        value = self.state.get(self.key)
        if value is None or value.is_floating_point() or value.dim() != 3:
            return value
        return value.squeeze(0)

    @property
    def scale(self) -> Tensor | None:
        ours, of_bitsandbytes, _ = keys_beside(self.key)
        if ours in self.state:
            return self.state[ours]
        scale = self.state.get(of_bitsandbytes)
        return None if scale is None else scale.to(torch.float32) / QMAX

    def check(self) -> None:
        """Raises:
        CheckpointError: names the tensor, what it is and what it should be.
        """
        key, value, scale, weight = self.key, self.value, self.scale, self.weight
        if value is None:
            if scale is not None:
                raise CheckpointError(f"{key}: its scales are there, and its int8 values are missing")
            return
        if tuple(value.shape) != tuple(weight.shape):
            raise CheckpointError(
                f"{key}: shape {list(value.shape)} in the checkpoint, {list(weight.shape)} in the model"
            )
        if value.dtype == torch.int8:
            self._check_int8(value, scale)
        elif not value.is_floating_point():
            raise CheckpointError(f"{key}: {value.dtype} in the checkpoint; allowed: int8, or a float")

    def _check_int8(self, value: Tensor, scale: Tensor | None) -> None:
        key, N = self.key, self.weight.w_scale.shape[0]
        if scale is None:
            ours, theirs, _ = keys_beside(key)
            raise CheckpointError(f"{key}: int8 values without their scales, {ours} or {theirs}")
        if tuple(scale.shape) != (N,):
            raise CheckpointError(f"{key}: scales of shape {list(scale.shape)}, {[N]} expected")
        if scale.is_meta or value.is_meta:
            return
        if not (scale.isfinite() & (scale > 0)).all():
            raise CheckpointError(f"{key}: corrupt: a scale that is not finite, or not above 0")
        if value.amin() < -QMAX:
            raise CheckpointError(f"{key}: corrupt: a value of -128, where int8 weights end at -127")

    def read(self) -> Int8Weight | None:
        """The int8 weight in the entry; None when there is none.

        Raises:
            CheckpointError: as ``check``.
        """
        self.check()
        value, weight = self.value, self.weight
        if value is None or isinstance(value, Int8Weight):
            return value
        if value.dtype != torch.int8:
            return Int8Weight.from_float(
                value,
                **weight.activation_options,
                transposed=weight.transposed,
            )
        scale = self.scale
        assert scale is not None
        w_scale = scale.detach().to(torch.float32, copy=True)
        return weight.like(in_its_shape(value.detach(), weight), w_scale)


def read(key: str, like: Int8Weight, state: Mapping[str, Any]) -> Int8Weight | None:
    """The int8 weight that a ``state_dict`` holds under ``key``, with the attributes of ``like``.

    Raises:
        CheckpointError: names the tensor, what it is and what it should be.
    """
    return _Entry(key, like, state).read()


def _read(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    for name, weight in _int8_parameters(module):
        entry = _Entry(prefix + name, weight, state)
        found = entry.read()
        if found is not None:
            state[entry.key] = found
        for key in keys_beside(entry.key):
            state.pop(key, None)


def check(model: nn.Module, state: Mapping[str, Any], prefix: str = "", *_: Any) -> None:
    """Whether what a ``state_dict`` holds fits the model; names that either lacks are torch's to tell.

    Raises:
        CheckpointError: names the first tensor that does not, what it is and what it should be.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        base = f"{prefix}{path}." if path else prefix
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in tensors:
            if isinstance(tensor, Int8Weight):
                _Entry(base + name, tensor, state).check()
            else:
                _check_float(base + name, tensor, state.get(base + name))


def _check_float(key: str, tensor: Tensor, value: Tensor | None) -> None:
    if value is not None and value.is_floating_point() is not tensor.is_floating_point():
        # torch would copy int8 values into a float parameter without a word.
        hint = ""
        if value.dtype == torch.int8:
            hint = "; int8fx.quantize_(model) before makes weights int8"
            if hasattr(tensor, "to_local") and isinstance(tensor.to_local(), Int8Weight):
                hint = ", in int8 shards: load whole weights before the model is sharded"
        raise CheckpointError(
            f"{key}: {value.dtype} in the checkpoint, {tensor.dtype} in the model{hint}"
        )
    if value is not None and tuple(value.shape) != tuple(tensor.shape):
        raise CheckpointError(
            f"{key}: shape {list(value.shape)} in the checkpoint, {list(tensor.shape)} in the model"
        )
