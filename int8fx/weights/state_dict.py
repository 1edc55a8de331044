"""How quantised weights are written to a ``state_dict`` and read from one.

Int8 with a scale per channel, or one for all:

    weight          [1, N, K] int8: the shape of the parameter behind a one, the same on every device
    weight_scale    [N] fp32, one per output channel

Other formats have an entry for each of their parts, as ``weight_packed``, and one more that says what
they are: their shapes need not tell a group of 64 from a rotation by 64.

    weight_scheme   uint8, the scheme's name and settings as JSON

An int8 weight that another system made, with values of -128, has that entry as well. They are plain
tensors, for safetensors and for every other tool; loading packs them again. A float
``weight`` is quantised on loading; int8 values in the shape of the parameter, which we wrote before,
are read as well, and so are bitsandbytes' ``weight`` and ``SCB`` (``SCB`` = 127 · ``weight_scale``)
and, for ``int8-rotated``, ConvRot's (``convrot.py``).

Why the one: nobody may take the integers for the values of a float weight, as torch and transformers
copy any number into a parameter of its shape, and tell of a scale that nothing reads in a warning at
most. Of another shape, ``load_state_dict`` refuses each int8 weight by name, strict or not, and
``from_pretrained`` the model. Another name instead would not do: transformers fills what it misses
with random numbers. It does so with another shape, too, if its caller asks for that, so the
configuration beside the files makes it refuse them (``int8fx/integrations/transformers.py``).

What does not fit raises ``CheckpointError`` before anything is loaded.

torch.distributed.checkpoint takes ``model.state_dict()``. Its ``get_model_state_dict`` does not, unless
the weights are in shards: it asks a module for an attribute of each name, and ``weight_scale`` is none.
Shards are written as the ``QuantizedWeight``s that they are (``int8fx/weights/sharding.py`` puts them
together).
"""

import functools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from int8fx import torch_private
from int8fx.errors import CheckpointError
from int8fx.kernels import packing
from int8fx.kernels.formats.format import COLUMNS, ROWS, WeightFormat
from int8fx.kernels.formats.int8 import PER_CHANNEL
from int8fx.kernels.ops.quantize_reference import QMAX
from int8fx.kernels.schemes.scheme import Choice
from int8fx.kernels.schemes.table import scheme_named
from int8fx.weights import convrot, describe
from int8fx.weights.tensor import QuantizedWeight

SCALE = "_scale"
SCHEME = "_scheme"
INTEGERS = (torch.int8, torch.uint8)
# bitsandbytes keeps its scales beside the weight, under a name of its own.
BITSANDBYTES_SCALE = "SCB"
BITSANDBYTES_FORMAT = "weight_format"


def part_names(key: str, weight_format: WeightFormat) -> list[str]:
    """Under which names a ``state_dict`` holds the parts of the weight ``key``: integers in its shape
    have its own."""
    first, *others = weight_format.parts
    is_own = first.dims == (ROWS, COLUMNS) and first.dtype in INTEGERS
    return [key if is_own else f"{key}_{first.name}", *(f"{key}_{part.name}" for part in others)]


def is_plain(weight_format: WeightFormat) -> bool:
    """Whether it is stored as int8 with a scale per channel, as every version of int8fx reads it."""
    return weight_format.files == PER_CHANNEL.name


def names_of(key: str, weight_format: WeightFormat) -> list[str]:
    """The names of the entries that ``entries`` makes."""
    names = part_names(key, weight_format)
    return names if is_plain(weight_format) else [*names, key + SCHEME]


def names_of_all(key: str, choices: Iterable[Choice]) -> list[str]:
    """The names that the entries of a weight of any of these schemes have."""
    names = (name for choice in choices for name in names_of(key, choice.weight_format))
    return list(dict.fromkeys(names))


def keys_of(key: str, weight: Any) -> set[str]:
    """Every name under which a ``state_dict`` may hold something of the parameter ``key``."""
    keys = {key, key + SCHEME, convrot.marker_of(key), *keys_beside(key)}
    if isinstance(weight, QuantizedWeight):
        keys.update(names_of(key, weight.weight_format))
    return keys


def is_in(state: Mapping[str, Any], key: str, weight: Any) -> bool:
    """Whether a ``state_dict`` holds the values of the parameter ``key``, in float or in integers."""
    if not isinstance(weight, QuantizedWeight):
        return key in state
    return key in state or part_names(key, weight.weight_format)[0] in state


def keys_beside(key: str) -> tuple[str, str, str]:
    """What may come with the int8 values under ``key``: our scales, or bitsandbytes' and its format."""
    owner = key.rpartition(".")[0]
    prefix = f"{owner}." if owner else ""
    return key + SCALE, prefix + BITSANDBYTES_SCALE, prefix + BITSANDBYTES_FORMAT


def attach(module: nn.Module) -> None:
    """Makes a module write and read its int8 weights in the form above, and print them."""
    describe.attach(module)
    module.register_state_dict_post_hook(_write)
    module.register_load_state_dict_pre_hook(_read)


def check_on_load(model: nn.Module) -> None:
    """Makes loading into a model check all of its tensors, once, before the first is changed."""
    if not checks_on_load(model):
        model.register_load_state_dict_pre_hook(check)


def checks_on_load(model: nn.Module) -> bool:
    return torch_private.reads_through(model, check)


def _quantized_parameters(module: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    for name, weight in module.named_parameters(recurse=False):
        if isinstance(weight, QuantizedWeight):
            yield name, weight


# --- writing -------------------------------------------------------------------------------------


def _write(module: nn.Module, state: MutableMapping[str, Any], prefix: str, metadata: Any) -> None:
    for name, _ in _quantized_parameters(module):
        weight = state.get(prefix + name)
        if isinstance(weight, QuantizedWeight):
            weight.check_readable(prefix + name)
            found = entries(prefix + name, weight)
            state.update(found)
            if prefix + name not in found:
                del state[prefix + name]


def entries(key: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """What a ``state_dict`` holds of a weight."""
    weight_format, found = weight.weight_format, {}
    for name, tensor in zip(part_names(key, weight_format), weight.stored(), strict=True):
        # A copy, as the integers are: writers drop one of two names with the same memory.
        found[name] = (
            in_its_shape(tensor, weight).unsqueeze(0)
            if name == key
            else tensor.clone(memory_format=torch.contiguous_format)
        )
    if not is_plain(weight_format) or _is_below_ours(found[key]):
        found[key + SCHEME] = _scheme_entry(weight)
    return found


def _is_below_ours(w_int8: Tensor) -> bool:
    """Whether integers are of another system's file: our own end at -127, and -128 is a fault."""
    return w_int8.numel() > 0 and not w_int8.is_meta and bool(w_int8.amin() < -QMAX)


def _scheme_entry(weight: QuantizedWeight) -> Tensor:
    choice = weight.choice
    said = {"scheme": choice.scheme.name, "settings": asdict(choice.settings)}
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8, device=weight.device)


def check_options(
    weights: Iterable[tuple[str, Tensor]], options_of: Callable[[str], Mapping[str, Any]]
) -> None:
    """Whether files whose ``config.json`` gives each weight ``options_of(path of its module)``, and
    experts those of their own path, say what it is kept with.

    Raises:
        ValueError: names the first weight with others.
    """
    for name, weight in weights:
        is_batch = isinstance(weight, QuantizedWeight) and bool(weight.batch)
        options = options_of(name if is_batch else name.rpartition(".")[0])
        # Columns of a calibration are each weight's own, and with it in the files.
        own = weight.options if isinstance(weight, QuantizedWeight) else options
        if _without(own, {"columns"}) != _without(options, {"columns"}):
            alike = {"columns", *({"scheme"} if own["scheme"] == options["scheme"] else ())}
            ours, theirs = _without(own, alike), _without(options, alike)
            raise ValueError(
                f"{name} has {ours}, and config.json holds one setting for all "
                f"weights, {theirs}; int8fx.save_checkpoint writes the weights alone"
            )


def _without(options: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def in_its_shape(w_int8: Tensor, weight: QuantizedWeight) -> Tensor:
    """``w_int8 [N, K]`` in the shape of the parameter; and back."""
    return w_int8.t().contiguous() if weight.transposed else w_int8


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """The part of a ``state_dict`` that belongs to one int8 weight."""

    key: str
    weight: QuantizedWeight
    state: Mapping[str, Any]

    @functools.cached_property
    def choice(self) -> Choice:
        """The weight's, with the columns that the entry has, which a calibration chose.

        Raises:
            CheckpointError: the entry is of another format.
        """
        ours, entry = self.weight.choice, self.state.get(self.key + SCHEME)
        if entry is None or entry.is_meta:
            return ours
        try:
            said = json.loads(bytes(entry.tolist()))
            choice = scheme_named(said["scheme"]).choice(**said["settings"])
            stored, expected = choice.weight_format.files, ours.weight_format.files
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.key}{SCHEME}: {error}") from error
        if stored == expected:
            return ours
        if choice.apart_from_columns == ours.apart_from_columns:
            return choice
        raise CheckpointError(f"{self.key}: {stored} in the checkpoint, {expected} in the model")

    @property
    def weight_format(self) -> WeightFormat:
        """The format of what is stored."""
        return self.choice.weight_format

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
        key, value, weight = self.key, self.value, self.weight
        if value is not None and value.is_floating_point():
            self._check_shape(key, value, tuple(weight.shape))
            return
        if is_plain(self.weight_format):
            self._check_plain(value, self.scale)
        else:
            self._check_parts()

    def _check_plain(self, value: Tensor | None, scale: Tensor | None) -> None:
        key = self.key
        if value is None:
            if scale is not None:
                raise CheckpointError(f"{key}: its scales are there, and its int8 values are missing")
            return
        self._check_shape(key, value, tuple(self.weight.shape))
        if value.dtype != torch.int8:
            raise CheckpointError(f"{key}: {value.dtype} in the checkpoint; allowed: int8, or a float")
        if scale is None:
            ours, theirs, _ = keys_beside(key)
            raise CheckpointError(f"{key}: int8 values without their scales, {ours} or {theirs}")
        if tuple(scale.shape) != (self.weight.N,):
            raise CheckpointError(
                f"{key}: scales of shape {list(scale.shape)}, {[self.weight.N]} expected"
            )
        if scale.is_meta or value.is_meta:
            return
        if not (scale.isfinite() & (scale > 0)).all():
            raise CheckpointError(f"{key}: corrupt: a scale that is not finite, or not above 0")
        if _is_below_ours(value) and key + SCHEME not in self.state:
            raise CheckpointError(f"{key}: corrupt: a value of -128, where int8 weights end at -127")

    def _check_parts(self) -> None:
        key, weight, weight_format = self.key, self.weight, self.weight_format
        names = dict(zip(part_names(key, weight_format), weight_format.parts, strict=True))
        missing = [name for name in (*names, key + SCHEME) if name not in self.state]
        if len(missing) == len(names) + 1:
            return
        if missing:
            raise CheckpointError(
                f"{key}: {missing[0]} is missing in the checkpoint, and the model has it "
                f"{weight_format.name}"
            )
        for name, part in names.items():
            tensor = self.value if name == key else self.state[name]
            stored = (*weight.batch, *part.shape(weight.N, weight.K))
            shape = tuple(weight.shape) if name == key else stored
            self._check_shape(name, tensor, shape)
            floating = part.dtype is None and tensor.is_floating_point()
            if tensor.dtype != part.dtype and not floating:
                raise CheckpointError(
                    f"{name}: {tensor.dtype} in the checkpoint, {part.dtype or 'a float'} expected"
                )
            if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
                raise CheckpointError(f"{name}: corrupt: a value that is not finite")

    def _check_shape(self, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(value.shape) != shape:
            raise CheckpointError(
                f"{name}: shape {list(value.shape)} in the checkpoint, {list(shape)} in the model"
            )

    def read(self) -> QuantizedWeight | None:
        """The weight in the entry; None when there is none.

        Raises:
            CheckpointError: as ``check``.
        """
        value, weight = self.value, self.weight
        if isinstance(value, QuantizedWeight):
            self._check_shape(self.key, value, tuple(weight.shape))
            return value
        self.check()
        if value is not None and value.is_floating_point():
            return weight.quantize_like(value)
        if is_plain(self.weight_format):
            if value is None:
                return None
            scale = self.scale
            assert scale is not None
            return self._of([in_its_shape(value, weight), scale.to(torch.float32)])
        names = part_names(self.key, self.weight_format)
        if names[0] not in self.state:
            return None
        own = {self.key: in_its_shape(value, weight)} if names[0] == self.key else {}
        return self._of([own.get(name, self.state[name]) for name in names])

    def _of(self, stored: list[Tensor]) -> QuantizedWeight:
        stored = [part.detach() for part in stored]
        weight = self.weight
        packed = packing.pack(self.weight_format, stored, weight.N, weight.K)
        # A file that is mapped, or somebody else's tensor, must not be what a weight consists of.
        return weight.with_packed(
            [tensor.clone() if any(tensor is part for part in stored) else tensor for tensor in packed],
            choice=self.choice,
        )


def _entry(key: str, weight: QuantizedWeight, state: Mapping[str, Any]) -> _Entry:
    return _Entry(key, weight, convrot.as_ours(key, weight, state))


def check_schemes(weights: Iterable[tuple[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Whether the weights that a ``state_dict`` holds are of the formats that they have in the model.

    Raises:
        CheckpointError: names the first that is not, and both formats.
    """
    for key, weight in weights:
        if isinstance(weight, QuantizedWeight):
            _ = _entry(key, weight, state).choice


def read(key: str, like: QuantizedWeight, state: Mapping[str, Any]) -> QuantizedWeight | None:
    """The int8 weight that a ``state_dict`` holds under ``key``, with the attributes of ``like``.

    Raises:
        CheckpointError: names the tensor, what it is and what it should be.
    """
    return _entry(key, like, state).read()


def _read(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    for name, weight in _quantized_parameters(module):
        entry = _entry(prefix + name, weight, state)
        found = entry.read()
        if found is not None:
            state[entry.key] = found
            if found.choice != weight.choice and not weight.is_meta:
                weight.data = found  # copying its values would keep the columns that the weight has
        for key in keys_of(entry.key, weight) - {entry.key}:
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
            if isinstance(tensor, QuantizedWeight):
                _entry(base + name, tensor, state).check()
            else:
                _check_float(base + name, tensor, state.get(base + name))


def _check_float(key: str, tensor: Tensor, value: Tensor | None) -> None:
    if value is not None and value.is_floating_point() is not tensor.is_floating_point():
        # torch would copy int8 values into a float parameter without a word.
        hint = ""
        if value.dtype == torch.int8:
            hint = "; int8fx.quantize_(model) before makes weights int8"
            if hasattr(tensor, "to_local") and isinstance(tensor.to_local(), QuantizedWeight):
                hint = ", in int8 shards: load whole weights before the model is sharded"
        raise CheckpointError(
            f"{key}: {value.dtype} in the checkpoint, {tensor.dtype} in the model{hint}"
        )
    if value is not None and tuple(value.shape) != tuple(tensor.shape):
        raise CheckpointError(
            f"{key}: shape {list(value.shape)} in the checkpoint, {list(tensor.shape)} in the model"
        )
