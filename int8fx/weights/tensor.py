"""A weight that is kept quantised: a tensor subclass that stands where the float parameter stood.

    weight ≈ dequantize(parts)        the parts of a format (``kernels/formats/format.py``)

For int8 per channel that is ``w_int8 · w_scale``, with ``w_int8 [N, K]`` int8 and ``w_scale [N]`` fp32.
``Int8Weight`` is the name of the class for users, whatever the format.

It holds the tensors that its device's kernel takes (``kernels/packing.py``) and no second form;
``stored`` unpacks them, bit for bit. To the rest of torch it is a float tensor of the shape that it
had, with the values that its parts stand for, which may be read and moved; what may write to them is
in ``int8fx/weights/operators.py``.

A product with it is that of its scheme, by the same operators that the backend puts into a graph, so
eager and compiled results are one arithmetic. Compiled by another backend, AOTAutograd takes it apart
and finds these operators as well.

Why a subclass, and no parametrization: ``torch.nn.utils.parametrize`` changes the module's class,
renames its ``state_dict`` entries and forbids pickling, and its computed weight is an activation to
a graph. A subclass keeps class, names and pickling, reaches a backend as one input, and FSDP2 and
DTensor hold it as they hold any shard.
"""

import copy
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, nn

from int8fx.errors import ReleasedWeightError
from int8fx.kernels import packing
from int8fx.kernels.cpu import pages
from int8fx.kernels.formats.format import WeightFormat, stacked
from int8fx.kernels.schemes.scheme import Choice
from int8fx.kernels.schemes.table import DEFAULT, scheme_named
from int8fx.torch_private import (
    is_fake,
    is_loaded,
    map_tensors,
    new_wrapper,
    out_of_inference_mode,
    swap_despite_references,
    without_torch_functions,
)
from int8fx.weights import gather
from int8fx.weights.computed_values import ComputedValues, read_only, refuse_writes
from int8fx.weights.pieces import Piece

_AMONG = "among"  # a list of one, which views have in common
_BESIDE = ("released", "columns_among")  # attributes that are set, and not among its form
_PART = "part_"  # what attributes of parts begin with


class QuantizedWeight(ComputedValues):
    """A weight that is kept quantised. To torch it is a float tensor of its shape, which may be read.

    Attributes:
        choice: the scheme that it was quantised by, with the settings of its products.
        tensors: what the kernel of its device takes; every call of a compiled graph reads them. Each is
            an attribute by its part's name as well, for ``__tensor_flatten__``.
        N, K: rows and columns of the matrix.
        batch: ``(E,)`` where it is a batch of E such matrices, as experts are: its parts are stacked.
        transposed: whether the tensor stands for the transpose of each matrix (Hugging Face's
            ``Conv1D``, gpt-oss' experts).
        part_of: the weight that this one is a slice of, while that lives: it is packed anew, and what
            is written to it is written there as well.
        released: whether only compiled graphs may read it (``int8fx/compiler/release.py``).
        columns_among: the name of the group of processes that have the other columns of its rows, with
            the same scales (``row_parallel.py``); or empty.
        unpacked: the stored parts, until the packed ones are first asked for (``_rebuild_stored``).

    Examples:
        >>> import int8fx, torch
        >>> linear = int8fx.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 32)))[0]
        >>> type(linear.weight).__name__, linear.weight.dtype, linear.weight.choice.scheme.name
        ('QuantizedWeight', torch.float32, 'llm.int8')
        >>> linear.weight.dequantize().shape
        torch.Size([32, 64])
    """

    choice: Choice
    tensors: tuple[Tensor, ...]
    N: int
    K: int
    batch: tuple[int, ...]
    transposed: bool
    unpacked: Sequence[Tensor]
    part_of: Piece | None = None
    released: bool = False

    NO_DATA = (
        "an int8 weight has no float values in memory that C++ code, DLPack, numpy or TorchScript can "
        "share or save: weight.dequantize() is a float copy, int8fx.dequantize_(model) brings float "
        "weights back, and torch.export takes the model in int8"
    )

    # Torch functions are taken apart into aten operators before they come here.
    __torch_function__ = without_torch_functions

    @staticmethod
    def __new__(cls, *tensors: Tensor, **form: Any) -> "QuantizedWeight":
        """Of packed tensors; or a parameter of another quantised weight, as ``nn.Parameter`` makes it:
        ``type(parameter)(tensor, requires_grad=False)`` is what accelerate puts in its place.
        """
        if "choice" in form:
            return cls._of_packed(tensors, **form)
        if len(tensors) != 1:
            raise TypeError(f"{cls.__name__}: given {len(tensors)} tensors; {_FROM_FLOAT}")
        return _parameter(tensors[0], **form)

    @classmethod
    def _of_packed(
        cls,
        packed: Sequence[Tensor],
        *,
        choice: Choice,
        N: int,
        K: int,
        dtype: torch.dtype,
        transposed: bool,
        batch: Sequence[int] = (),
        size: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
    ) -> "QuantizedWeight":
        matrix = (K, N) if transposed else (N, K)
        shape = tuple(size) if size is not None else (*batch, *matrix)
        self = new_wrapper(cls, shape, stride, dtype, packed[0].device)
        self.choice, self.N, self.K, self.batch = choice, N, K, tuple(batch)
        self.transposed = transposed
        self._hold(packed)
        return self

    def _hold(self, packed: Sequence[Tensor]) -> None:
        # A weight may be made, or moved, where only inference is meant, and used in training then.
        self.tensors = tuple(map(out_of_inference_mode, packed))
        self.__dict__.update(zip(self._part_names, self.tensors, strict=True))

    @classmethod
    def from_float(
        cls, weight: Tensor, *, transposed: bool = False, scheme: str = DEFAULT, **settings: Any
    ) -> "QuantizedWeight":
        """Quantises ``weight [N, K]``, or ``[K, N]`` when ``transposed``; or E of them, each by itself.

        Raises:
            TypeError: the weight is no tensor of floats.
            ValueError: it is no matrix; or no such scheme, or setting of it, is there.
        """
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"from_float: given {given}; allowed: a tensor of floats")
        if weight.dim() not in (2, 3):
            shape = list(weight.shape)
            raise ValueError(f"from_float: given a tensor of shape {shape}; allowed: [N, K], [E, N, K]")
        return cls.quantized(weight, scheme_named(scheme).choice(**settings), transposed)

    @classmethod
    def quantized(cls, weight: Tensor, choice: Choice, transposed: bool) -> "QuantizedWeight":
        """The same by a scheme with its settings."""
        matrix = weight.detach().transpose(-1, -2) if transposed else weight.detach()
        *batch, N, K = matrix.shape
        weight_format = choice.weight_format
        if matrix.is_meta:
            empty = weight.dtype, weight.device, tuple(batch)
            stored: Sequence[Tensor] = weight_format.zeros(N, K, *empty)
        else:
            stored = stacked(weight_format, matrix)
        packed = packing.pack(weight_format, stored, N, K)
        form = {"N": N, "K": K, "batch": batch, "dtype": weight.dtype, "transposed": transposed}
        made = cls(*packed, choice=choice, **form)
        del stored
        pages.trim_heap()
        return made

    # --- what it holds ---------------------------------------------------------------------------

    @property
    def weight_format(self) -> WeightFormat:
        return self.choice.weight_format

    @property
    def _part_names(self) -> list[str]:
        return [_PART + name for name in self.weight_format.packed_names]

    def stored(self) -> list[Tensor]:
        """The parts of its format, which depend on no kernel; the integers are a copy."""
        if self.batch:
            codes = torch.stack([codes for codes, *_ in self._matrices()])
            return [codes, *self.tensors[1 : len(self.weight_format.parts)]]
        codes, *others = packing.unpack(self.weight_format, self.tensors, self.N, self.K)
        return [codes.clone() if codes is self.packed else codes, *others]

    def _matrices(self) -> Iterator[list[Tensor]]:
        """The stored parts of each matrix of a batch."""
        weight_format = self.weight_format
        for e in range(self.batch[0]):
            packed = weight_format.matrix_of(self.tensors, e)
            yield packing.unpack(weight_format, packed, self.N, self.K)

    @property
    def packed(self) -> Tensor:
        """The integers, as the kernel of its device takes them."""
        return self.tensors[0]

    @property
    def w_int8(self) -> Tensor:
        """``[N, K]`` int8, a copy, of a format that has them."""
        return self._named("int8", self.stored())

    @property
    def w_scale(self) -> Tensor:
        """The scales of a format that has some: ``[N]`` fp32, where there is one a channel."""
        return self._named("scale", self.tensors)

    def _named(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        names = [part.name for part in self.weight_format.parts]
        if name not in names:
            raise AttributeError(f"a weight of {self.weight_format.name} has no {name!r}, but {names}")
        return tensors[names.index(name)]

    @property
    def options(self) -> dict[str, Any]:
        """What ``quantize_`` takes for such a weight."""
        return self.choice.options

    @property
    def activation_options(self) -> dict[str, Any]:
        """The same without the scheme."""
        return asdict(self.choice.settings)

    @property
    def threshold(self) -> float:
        return self.choice.settings.threshold

    @property
    def decomposition(self) -> str:
        return self.choice.settings.decomposition

    @property
    def described(self) -> str:
        """As messages call it."""
        return f"{self.weight_format.a_weight} of shape {list(self.shape)}"

    @property
    def int8_bytes(self) -> int:
        """What it takes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def columns_among(self) -> str:
        return self.__dict__.get(_AMONG, [""])[0]

    @columns_among.setter
    def columns_among(self, name: str) -> None:
        self.__dict__[_AMONG] = [name]

    def shares_columns_as(self, other: "QuantizedWeight") -> None:
        """From now on what is set as ``columns_among`` of a view is that of the other view, too."""
        if _AMONG in other.__dict__:
            self.__dict__[_AMONG] = other.__dict__[_AMONG]

    def no_longer_shares_columns(self) -> None:
        """All views of it: what was written may have scales of this process's own."""
        self.__dict__.get(_AMONG, [""])[0] = ""

    def check_readable(self, name: str = "") -> None:
        """Raises:
        ReleasedWeightError: only compiled graphs may read it.
        """
        if self.released:
            raise ReleasedWeightError(name or f"a weight of shape {list(self.shape)}")

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float tensor that this stands for, contiguous, in its dtype or another."""
        dtype = dtype or self.dtype
        if self.batch:
            values = torch.stack([self._in_float(stored, dtype) for stored in self._matrices()])
        else:
            stored = packing.unpack(self.weight_format, self.tensors, self.N, self.K)
            values = self._in_float(stored, dtype)
        return values.reshape(self.shape)

    def _in_float(self, stored: list[Tensor], dtype: torch.dtype) -> Tensor:
        """One matrix."""
        if dtype == torch.float64:
            stored = [part.double() if part.is_floating_point() else part for part in stored]
        matrix = self.weight_format.dequantize(stored, self.N, self.K).to(dtype)
        return matrix.t().contiguous() if self.transposed else matrix

    def requires_grad_(self, requires_grad: bool = True) -> "QuantizedWeight":
        """Raises:
        RuntimeError: an int8 weight cannot be trained.
        """
        if requires_grad:
            raise RuntimeError(
                f"{self.described} cannot require grad: train an adapter "
                "beside it (LoRA), or bring the float weights back with int8fx.dequantize_(model)"
            )
        super().requires_grad_(False)
        return self

    @property
    def requires_grad(self) -> bool:
        return Tensor.requires_grad.__get__(self)  # type: ignore[attr-defined]

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self.requires_grad_(requires_grad)

    def _read_values(self) -> Tensor:
        self.check_readable()
        return self.dequantize()

    def element_size(self) -> float:  # type: ignore[override]
        """Bytes in memory over elements, scales and padding included: what footprints multiply by."""
        return self.int8_bytes / self.numel()

    def data_ptr(self) -> int:
        """Of the int8 form: what tells weights apart, and finds tied ones."""
        return self.packed.data_ptr()

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        """Torch's own would leave the int8 form behind.

        Raises:
            RuntimeError: the value is in float and of another shape.
        """
        other: Any = value if isinstance(value, QuantizedWeight) else self.clone().copy_(value)
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        for name in self._part_names:
            self.__dict__.pop(name, None)
        owned = {name: each for name, each in other.__dict__.items() if name in other._own_names()}
        self.__dict__.update(owned)
        self.part_of = None
        self.columns_among = other.columns_among

    def __setitem__(self, index: Any, value: Any) -> None:
        """Raises:
        RuntimeError: an int8 weight is read-only; torch would write to a copy.
        """
        raise RuntimeError(
            f"{self.described} is read-only, no part of it can be set: "
            "int8fx.dequantize_(model) brings back a float weight to write to"
        )

    def share_memory_(self) -> "QuantizedWeight":
        """Moves the int8 form to shared memory, in place."""
        for tensor in self.tensors:
            tensor.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.packed.is_shared()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        name = "Int8Weight" if self.weight_format.bits == 8 else type(self).__name__
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        form = f"shape={list(self.shape)}, dtype={self.dtype}, device={self.device}"
        return f"{name}({form}{options})"

    def __getattr__(self, name: str) -> Any:
        """Packed parts, of a weight from a file of the old ``torch.save`` (``_rebuild_stored``)."""
        is_part = name == "tensors" or name.startswith(_PART)
        if not is_part or "unpacked" not in self.__dict__:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute {name!r}")
        self._hold(packing.pack(self.weight_format, self.__dict__.pop("unpacked"), self.N, self.K))
        return getattr(self, name)

    # --- torch's protocols -----------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return self._part_names, self._attributes() | {name: getattr(self, name) for name in _BESIDE}

    @classmethod
    def __metadata_guard__(cls, before: dict[str, Any], now: dict[str, Any]) -> bool:
        """Whether a graph of one weight serves another: columns of a calibration are an input of it."""
        return _guarded(before) == _guarded(now)

    @classmethod
    def __tensor_unflatten__(cls, inner, attributes, size, stride) -> "QuantizedWeight":
        form = {name: value for name, value in attributes.items() if name not in _BESIDE}
        packed = [inner[_PART + name] for name in form["choice"].weight_format.packed_names]
        weight = cls(*packed, size=size, stride=stride, **form)
        for name in _BESIDE:
            setattr(weight, name, attributes[name])
        return weight

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):

        return call(func, args, kwargs or {})

    def _stable_hash_for_caching(self) -> str:
        """What compile caches tell weights apart by: everything but the values."""
        shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in self.tensors]
        form = (tuple(self.shape), self.stride(), self.device, shapes, self.weight_format.name)
        beside = (getattr(self, name) for name in _BESIDE)
        return f"Int8Weight{(*form, *self._plain_attributes().values(), *beside)}"

    def __deepcopy__(self, memo):
        self.check_readable()
        if id(self) not in memo:
            packed = [tensor.clone() for tensor in self.tensors]
            copied = self.with_packed(packed, size=self.shape, stride=self.stride())
            copied.columns_among = self.columns_among
            copied.__dict__.update(copy.deepcopy(self._extras(), memo))
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        self.check_readable()
        # Not the packed form: a pickle may be read on a machine with another kernel.
        return _rebuild_stored, (tuple(self.stored()), self._plain_attributes(), self._extras())

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """FSDP2: what the ranks exchange, and what they know without."""
        cut = gather.Cut.of(self, mesh.size(), outer_size)
        return gather.to_gather(self, cut), cut

    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None):
        """FSDP2: the whole weight from what all ranks gave."""
        stored = gather.with_empty_parts(self, gather.gathered(outputs, metadata), metadata)
        whole = self.with_stored(stored, *metadata.matrix, dtype=param_dtype)
        if out is None:
            # FSDP frees the memory between two uses of the weight, so it must be torch's own.
            owned = whole.with_packed([tensor.clone() for tensor in whole.tensors])
            return owned, owned.tensors
        for tensor, gathered in zip(out.tensors, whole.tensors, strict=True):
            tensor.copy_(gathered)
        return None

    # --- copies of itself ------------------------------------------------------------------------

    def with_stored(
        self, stored: Sequence[Tensor], N: int, K: int, **changed: Any
    ) -> "QuantizedWeight":
        """Another matrix, of stored parts, with the attributes of this one, some changed."""
        weight_format = changed.get("choice", self.choice).weight_format
        packed = packing.pack(weight_format, stored, N, K)
        return self.with_packed(packed, N=N, K=K, **changed)

    def with_packed(self, packed: Sequence[Tensor], **changed: Any) -> "QuantizedWeight":
        return type(self)(*packed, **(self._attributes() | changed))

    def on_meta(self, **changed: Any) -> "QuantizedWeight":
        """Without its values, some attributes changed."""
        stored = self.zeros(self.N, self.K, torch.device("meta"))
        layout = {"size": self.shape, "stride": self.stride()}
        return self.with_stored(stored, self.N, self.K, **layout, **changed)

    def zeros(self, N: int, K: int, device: torch.device) -> list[Tensor]:
        """Stored parts that stand for zeros."""
        return self.weight_format.zeros(N, K, self.dtype, device, self.batch)

    def quantize_like(self, weight: Tensor) -> "QuantizedWeight":
        """A float tensor, quantised as this one is."""
        return type(self).quantized(weight, self.choice, self.transposed)

    def _attributes(self) -> dict[str, Any]:
        form = {"N": self.N, "K": self.K, "batch": self.batch, "dtype": self.dtype}
        return {"choice": self.choice, **form, "transposed": self.transposed}

    def _plain_attributes(self) -> dict[str, Any]:
        """The same in numbers and names, as they are pickled."""
        plain = {name: each for name, each in self._attributes().items() if name != "choice"}
        scheme, settings = self.choice.scheme.name, asdict(self.choice.settings)
        return plain | {"scheme": scheme, "settings": settings}

    def _own_names(self) -> set[str]:
        return {"unpacked", "tensors", *self._part_names, *self._attributes()}

    def _extras(self) -> dict[str, Any]:
        """What else was set on the tensor: ``_is_param``, and whatever frameworks left."""
        own = {"part_of", "released", _AMONG} | self._own_names()
        return {name: value for name, value in self.__dict__.items() if name not in own}


# What users call it.
Int8Weight = QuantizedWeight

_FROM_FLOAT = "int8fx.Int8Weight.from_float quantises one"


def _guarded(attributes: dict[str, Any]) -> tuple:
    form = {name: value for name, value in attributes.items() if name != "choice"}
    choice = attributes["choice"]
    count = len(getattr(choice.settings, "columns", ()))
    return form, choice.apart_from_columns, count


def in_float(tensor: Tensor) -> Tensor:
    """What a tensor stands for, as a plain one in fp32."""
    return tensor.dequantize(torch.float32) if isinstance(tensor, QuantizedWeight) else tensor.float()


def _parameter(tensor: Tensor, requires_grad: bool = True) -> Any:
    """Raises:
    TypeError: the tensor is no quantised weight, so its scales are not there.
    """
    if not isinstance(tensor, QuantizedWeight):
        raise TypeError(
            f"no int8 weight can be made of a tensor of shape {list(tensor.shape)} and {tensor.dtype} "
            f"alone, without scales; {_FROM_FLOAT}"
        )
    if "accelerate" in sys.modules:
        # It is about to offload the weight, and would bring it back without its scales.
        importlib.import_module("int8fx.integrations.accelerate")
    return nn.Parameter(tensor, requires_grad)


# --- pickles -------------------------------------------------------------------------------------


def _rebuild_stored(stored: Sequence[Tensor], attributes: dict, extras: dict) -> QuantizedWeight:
    if all(map(is_loaded, stored)):
        form = _from_plain(attributes)
        packed = packing.pack(form["choice"].weight_format, stored, form["N"], form["K"])
        return _rebuild_packed(packed, attributes, extras)
    # Their values are not there to be packed: meta stands for them until they are asked for.
    form = _from_plain(attributes)
    weight_format = form["choice"].weight_format
    size = form["N"], form["K"], form["dtype"], stored[0].device, tuple(form.get("batch", ()))
    empty = weight_format.zeros(*size)
    weight = _rebuild_packed(
        (*empty, *weight_format.derive(empty, form["N"], form["K"])), attributes, extras
    )
    for name in ("tensors", *weight._part_names):
        delattr(weight, name)
    weight.unpacked = stored
    return weight


def _rebuild_packed(packed: Sequence[Tensor], attributes: dict, extras: dict) -> QuantizedWeight:
    weight = QuantizedWeight(*packed, **_from_plain(attributes))
    weight.__dict__.update(extras)
    return weight


def _from_plain(attributes: dict) -> dict[str, Any]:
    form = {name: each for name, each in attributes.items() if name not in ("scheme", "settings")}
    return {"choice": scheme_named(attributes["scheme"]).choice(**attributes["settings"]), **form}


def _rebuild(w_int8: Tensor, w_scale: Tensor, attributes: dict, extras: dict) -> QuantizedWeight:
    """Of a pickle from before there were formats."""
    names = ("threshold", "decomposition")
    settings = {name: attributes[name] for name in names}
    form = {name: each for name, each in attributes.items() if name not in names}
    plain = form | {"N": w_scale.shape[0], "scheme": DEFAULT, "settings": settings}
    return _rebuild_stored((w_int8, w_scale), plain, extras)


def _share(weight: QuantizedWeight) -> tuple:
    # Between processes of one machine the packed form itself is handed on, in shared memory.
    weight.check_readable()
    return _rebuild_packed, (weight.tensors, weight._plain_attributes(), weight._extras())


ForkingPickler.register(QuantizedWeight, _share)
swap_despite_references(QuantizedWeight)

# torch.load(weights_only=True) may rebuild it: of tensors, numbers and names only. That is how
# torch.distributed.checkpoint reads the shards of a weight, which it keeps as they are.
# Older files name another module.
torch.serialization.add_safe_globals(
    [_rebuild_stored, _rebuild, (_rebuild, "int8fx.quantized_weight._rebuild")]
)


aten = torch.ops.aten


Handler = Callable[[Any, tuple, dict], Any]


# They read no values, and what they return is released as well.
_ON_RELEASED = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.is_pinned.default,
}


_HANDLERS: dict[Any, Handler] = {}


def call(func: Any, args: tuple, kwargs: dict) -> Any:
    """An operator with a ``QuantizedWeight`` among its arguments.

    Raises:
        RuntimeError: the operator would write to the weight, or the weight was released.
    """
    if func not in _ON_RELEASED:
        # A copy into a weight does not read it.
        read = args[1:] if func is aten.copy_.default else args
        map_tensors(QuantizedWeight, _check_readable, (read, kwargs))
    handler = _HANDLERS.get(func) or _HANDLERS.get(func.name())
    if handler is not None:
        return handler(func, args, kwargs)
    # In inference mode what is made of other operators comes whole, as ``aten.to`` and ``aten.matmul``.
    result = func.decompose(*args, **kwargs)
    return on_float_values(func, args, kwargs) if result is NotImplemented else result


def _check_readable(weight: QuantizedWeight) -> QuantizedWeight:
    # Dynamo runs what it traces on fakes, before any backend has the graph.
    if not is_fake(weight.packed):
        weight.check_readable()
    return weight


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Operators, or names of other packages' operators, which need not be there."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def on_float_values(func: Any, args: tuple, kwargs: dict) -> Any:
    refuse_writes(QuantizedWeight, func, args, kwargs)
    traced = not all(type(weight.packed) is Tensor for weight in _weights((args, kwargs)))
    args, kwargs = map_tensors(QuantizedWeight, QuantizedWeight.dequantize, (args, kwargs))
    result = func(*args, **kwargs)
    # A trace knows from the operator that it is a copy, and what writes to it is functionalised.
    return result if traced else read_only(func, result)


def _weights(values: Any) -> list[QuantizedWeight]:
    found: list[QuantizedWeight] = []
    map_tensors(QuantizedWeight, found.append, values)
    return found
