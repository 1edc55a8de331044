"""A weight that is kept in int8: a tensor subclass that stands where the float parameter stood.

    weight ≈ w_int8 · w_scale        w_int8 [N, K] int8, w_scale [N] fp32

It holds the form that its device's kernel takes (``kernels/table.py``) and no second one; ``w_int8``
unpacks it, bit for bit. To the rest of torch it is a float tensor of the shape that it had, with
values ``w_int8 · w_scale``, which may be read and moved; what may write to them is in
``int8fx/weights/operators.py``.

A product with it is LLM.int8(), by the same operators that the backend puts into a graph, so eager
and compiled results are one arithmetic. Compiled by another backend, AOTAutograd takes it apart and
finds these operators as well.

Why a subclass, and no parametrization: ``torch.nn.utils.parametrize`` changes the module's class,
renames its ``state_dict`` entries and forbids pickling, and its computed weight is an activation to
a graph. A subclass keeps class, names and pickling, reaches a backend as one input, and FSDP2 and
DTensor hold it as they hold any shard.
"""

import copy
import importlib
import sys
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, nn

from int8fx.errors import ReleasedWeightError
from int8fx.kernels.cpu import pages
from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.quantize_reference import quantize_weight
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
from int8fx.weights.parts import Part, pack


class Int8Weight(ComputedValues):
    """See above.

    Attributes:
        packed: int8, as the kernel of its device takes it.
        w_scale: ``[N]`` fp32.
        K: columns of ``w_int8``; its rows are those of ``w_scale``.
        transposed: whether the tensor stands for ``(w_int8 · w_scale)ᵀ`` (Hugging Face's ``Conv1D``).
        threshold, decomposition: of the activations in a product, see ``int8fx.Options``.
        part_of: the weight that this one is a slice of, while that lives: it is packed anew, and what
            is written to it is written there as well.
        released: whether only compiled graphs may read it (``int8fx/compiler/release.py``).
        unpacked: ``w_int8`` in place of ``packed``, until that is first asked for (``_rebuild``).
    """

    packed: Tensor
    unpacked: Tensor
    w_scale: Tensor
    K: int
    transposed: bool
    threshold: float
    decomposition: str
    part_of: Part | None = None
    released: bool = False

    NO_DATA = (
        "an int8 weight has no float values in memory that C++ code, DLPack, numpy or TorchScript can "
        "share or save: weight.dequantize() is a float copy, int8fx.dequantize_(model) brings float "
        "weights back, and torch.export takes the model in int8"
    )

    # Torch functions are taken apart into aten operators before they come here.
    __torch_function__ = without_torch_functions

    @staticmethod
    def __new__(cls, packed: Tensor, *parts: Tensor, **form: Any) -> "Int8Weight":
        """Of its parts; or a parameter of another int8 weight, as ``nn.Parameter`` makes it:
        ``type(parameter)(tensor, requires_grad=False)`` is what accelerate puts in its place.
        """
        return cls._of_parts(packed, *parts, **form) if parts else _parameter(packed, **form)

    @classmethod
    def _of_parts(
        cls,
        packed: Tensor,
        w_scale: Tensor,
        *,
        K: int,
        dtype: torch.dtype,
        transposed: bool,
        threshold: float,
        decomposition: str,
        size: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
    ) -> "Int8Weight":
        N = w_scale.shape[0]
        shape = tuple(size) if size is not None else ((K, N) if transposed else (N, K))
        self = new_wrapper(cls, shape, stride, dtype, packed.device)
        # A weight may be made, or moved, where only inference is meant, and used in training then.
        self.packed, self.w_scale = map(out_of_inference_mode, (packed, w_scale))
        self.K, self.transposed = K, transposed
        self.threshold, self.decomposition = threshold, decomposition
        return self

    @classmethod
    def from_float(
        cls, weight: Tensor, *, threshold: float, decomposition: str, transposed: bool = False
    ) -> "Int8Weight":
        """Quantises ``weight [N, K]``, or ``[K, N]`` when ``transposed``."""
        matrix = weight.detach()
        w_int8, w_scale = quantize_weight(matrix.t() if transposed else matrix)
        quantized = cls(
            pack(w_int8),
            w_scale,
            K=w_int8.shape[1],
            dtype=weight.dtype,
            threshold=threshold,
            decomposition=decomposition,
            transposed=transposed,
        )
        del w_int8
        pages.trim_heap()
        return quantized

    @property
    def w_int8(self) -> Tensor:
        """``[N, K]`` int8, a copy."""
        N = self.w_scale.shape[0]
        return ops.unpack_weight(self.packed, N, self.K) if N and self.K else self.packed.clone()

    @property
    def int8_bytes(self) -> int:
        """What it takes in memory."""
        return self.packed.nbytes + self.w_scale.nbytes

    def check_readable(self, name: str = "") -> None:
        """Raises:
        ReleasedWeightError: only compiled graphs may read it.
        """
        if self.released:
            raise ReleasedWeightError(name or f"a weight of shape {list(self.shape)}")

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float tensor that this stands for, contiguous, in its dtype or another."""
        dtype = dtype or self.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        matrix = (self.w_int8.to(exact) * self.w_scale.to(exact).unsqueeze(1)).to(dtype)
        return (matrix.t().contiguous() if self.transposed else matrix).reshape(self.shape)

    def requires_grad_(self, requires_grad: bool = True) -> "Int8Weight":
        """Raises:
        RuntimeError: an int8 weight cannot be trained.
        """
        if requires_grad:
            raise RuntimeError(
                f"an int8 weight of shape {list(self.shape)} cannot require grad: train an adapter "
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
        other: Any = value if isinstance(value, Int8Weight) else self.clone().copy_(value)
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.packed, self.w_scale, self.part_of = other.packed, other.w_scale, None
        self.K, self.transposed = other.K, other.transposed
        self.threshold, self.decomposition = other.threshold, other.decomposition

    def __setitem__(self, index: Any, value: Any) -> None:
        """Raises:
        RuntimeError: an int8 weight is read-only; torch would write to a copy.
        """
        raise RuntimeError(
            f"an int8 weight of shape {list(self.shape)} is read-only, no part of it can be set: "
            "int8fx.dequantize_(model) brings back a float weight to write to"
        )

    def share_memory_(self) -> "Int8Weight":
        """Moves the int8 form to shared memory, in place."""
        self.packed.share_memory_()
        self.w_scale.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.packed.is_shared()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"Int8Weight(shape={list(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"threshold={self.threshold}, decomposition={self.decomposition!r})"
        )

    def __getattr__(self, name: str) -> Any:
        """``packed``, of a weight from a file of ``torch.save``'s old format (``_rebuild``)."""
        if name != "packed" or "unpacked" not in self.__dict__:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute {name!r}")
        self.packed = pack(self.__dict__.pop("unpacked"))
        return self.packed

    # --- torch's protocols -----------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["packed", "w_scale"], self._attributes() | {"released": self.released}

    @classmethod
    def __tensor_unflatten__(cls, inner, attributes, size, stride) -> "Int8Weight":
        form = {name: value for name, value in attributes.items() if name != "released"}
        weight = cls(inner["packed"], inner["w_scale"], size=size, stride=stride, **form)
        weight.released = attributes["released"]
        return weight

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):

        return call(func, args, kwargs or {})

    def _stable_hash_for_caching(self) -> str:
        """What compile caches tell weights apart by: everything but the values."""
        form = (tuple(self.shape), self.stride(), self.device, tuple(self.packed.shape))
        return f"Int8Weight{(*form, *self._attributes().values(), self.released)}"

    def __deepcopy__(self, memo):
        self.check_readable()
        if id(self) not in memo:
            parts = self.packed.clone(), self.w_scale.clone()
            copied = self.with_packed(*parts, size=self.shape, stride=self.stride())
            copied.__dict__.update(copy.deepcopy(self._extras(), memo))
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        self.check_readable()
        # Not the packed form: a pickle may be read on a machine with another kernel.
        return _rebuild, (self.w_int8, self.w_scale, self._attributes(), self._extras())

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """FSDP2: what the ranks exchange, and what they know without."""
        cut = gather.Cut.of(self, mesh.size(), outer_size)
        return gather.to_gather(self, cut), cut

    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None):
        """FSDP2: the whole weight from what all ranks gave."""
        whole = self.like(*gather.gathered(outputs, metadata), dtype=param_dtype)
        if out is None:
            # FSDP frees the memory between two uses of the weight, so it must be torch's own.
            owned = whole.with_packed(whole.packed.clone(), whole.w_scale.clone())
            return owned, (owned.packed, owned.w_scale)
        out.packed.copy_(whole.packed)
        out.w_scale.copy_(whole.w_scale)
        return None

    # --- copies of itself ------------------------------------------------------------------------

    def like(self, w_int8: Tensor, w_scale: Tensor, **changed: Any) -> "Int8Weight":
        """Another matrix, with the attributes of this one, some changed."""
        return self.with_packed(pack(w_int8), w_scale, K=w_int8.shape[1], **changed)

    def with_packed(self, packed: Tensor, w_scale: Tensor, **changed: Any) -> "Int8Weight":
        return type(self)(packed, w_scale, **(self._attributes() | changed))

    def on_meta(self, **changed: Any) -> "Int8Weight":
        """Without its values, some attributes changed."""
        packed = torch.empty(self.w_scale.shape[0], self.K, dtype=torch.int8, device="meta")
        w_scale = torch.empty_like(self.w_scale, device="meta")
        return self.with_packed(packed, w_scale, size=self.shape, stride=self.stride(), **changed)

    @property
    def activation_options(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "decomposition": self.decomposition}

    def _attributes(self) -> dict[str, Any]:
        form = {"K": self.K, "dtype": self.dtype, "transposed": self.transposed}
        return form | self.activation_options

    def _extras(self) -> dict[str, Any]:
        """What else was set on the tensor: ``_is_param``, and whatever frameworks left."""
        own = {"packed", "w_scale", "part_of", "released", *self._attributes()}
        return {name: value for name, value in self.__dict__.items() if name not in own}


def in_float(tensor: Tensor) -> Tensor:
    """What a tensor stands for, as a plain one in fp32."""
    return tensor.dequantize(torch.float32) if isinstance(tensor, Int8Weight) else tensor.float()


def _parameter(tensor: Tensor, requires_grad: bool = True) -> Any:
    """Raises:
    TypeError: the tensor is no int8 weight, so its scales are not there.
    """
    if not isinstance(tensor, Int8Weight):
        raise TypeError(
            f"no int8 weight can be made of a tensor of shape {list(tensor.shape)} and {tensor.dtype} "
            "alone, without scales; int8fx.Int8Weight.from_float quantises one"
        )
    if "accelerate" in sys.modules:
        # It is about to offload the weight, and would bring it back without its scales.
        importlib.import_module("int8fx.integrations.accelerate")
    return nn.Parameter(tensor, requires_grad)


def _rebuild(w_int8: Tensor, w_scale: Tensor, attributes: dict, extras: dict) -> Int8Weight:
    if is_loaded(w_int8):
        return _rebuild_packed(pack(w_int8), w_scale, attributes, extras)
    weight = _rebuild_packed(w_int8, w_scale, attributes, extras)
    weight.unpacked = weight.__dict__.pop("packed")  # its values are not there to be packed
    return weight


def _rebuild_packed(packed: Tensor, w_scale: Tensor, attributes: dict, extras: dict) -> Int8Weight:
    weight = Int8Weight(packed, w_scale, **attributes)
    weight.__dict__.update(extras)
    return weight


def _share(weight: Int8Weight) -> tuple:
    # Between processes of one machine the packed form itself is handed on, in shared memory.
    weight.check_readable()
    arguments = weight.packed, weight.w_scale, weight._attributes(), weight._extras()
    return _rebuild_packed, arguments


ForkingPickler.register(Int8Weight, _share)
swap_despite_references(Int8Weight)

# torch.load(weights_only=True) may rebuild it: of tensors, numbers and names only. That is how
# torch.distributed.checkpoint reads the shards of a weight, which it keeps as they are.
# Older files name another module.
torch.serialization.add_safe_globals([_rebuild, (_rebuild, "int8fx.quantized_weight._rebuild")])


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
    """An operator with an ``Int8Weight`` among its arguments.

    Raises:
        RuntimeError: the operator would write to the weight, or the weight was released.
    """
    if func not in _ON_RELEASED:
        # A copy into a weight does not read it.
        read = args[1:] if func is aten.copy_.default else args
        map_tensors(Int8Weight, _check_readable, (read, kwargs))
    handler = _HANDLERS.get(func)
    if handler is not None:
        return handler(func, args, kwargs)
    # In inference mode what is made of other operators comes whole, as ``aten.to`` and ``aten.matmul``.
    result = func.decompose(*args, **kwargs)
    return _on_the_float_values(func, args, kwargs) if result is NotImplemented else result


def _check_readable(weight: Int8Weight) -> Int8Weight:
    # Dynamo runs what it traces on fakes, before any backend has the graph.
    if not is_fake(weight.packed):
        weight.check_readable()
    return weight


def _on(*functions: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def _on_the_float_values(func: Any, args: tuple, kwargs: dict) -> Any:
    refuse_writes(Int8Weight, func, args, kwargs)
    traced = not all(type(weight.packed) is Tensor for weight in _weights((args, kwargs)))
    args, kwargs = map_tensors(Int8Weight, Int8Weight.dequantize, (args, kwargs))
    result = func(*args, **kwargs)
    # A trace knows from the operator that it is a copy, and what writes to it is functionalised.
    return result if traced else read_only(func, result)


def _weights(values: Any) -> list[Int8Weight]:
    found: list[Int8Weight] = []
    map_tensors(Int8Weight, found.append, values)
    return found
