"""A compiled graph behind the swap of its weights; one whose weights are int8 can be kept in a file.

Dynamo writes what ``torch.compile`` made of a function to a file and reads it again
(``torch.compile(f).aot_compile(...)``), and asks the backend's part to do the same. vLLM starts from
such files. Ours holds Inductor's code, and which inputs are int8 weights; the weights are not in it.
"""

import pickle
from collections.abc import Collection
from typing import Any

from int8fx import torch_private
from int8fx.compiler.identity import cache_identity
from int8fx.compiler.swap import WeightSwap
from int8fx.kernels import table
from int8fx.weights.store import STORE


class CompiledGraph:
    """A callable with the signature of the graph as Dynamo gave it.

    Args:
        swap: of the float weights among the arguments for packed ones.
        compiled: takes what the swap returns.
        devices: the device types of the graph's inputs.
        below_autograd: whether no backward pass follows any call.
    """

    def __init__(
        self,
        swap: WeightSwap,
        compiled: Any,
        devices: Collection[str] = (),
        below_autograd: bool = False,
    ) -> None:
        torch_private.declare_serializable(CompiledGraph)
        self.swap, self.compiled, self.is_below_autograd = swap, compiled, below_autograd
        self.devices = frozenset(devices)
        self._run = torch_private.below_autograd(compiled) if below_autograd else compiled

    def __call__(self, *args: Any) -> Any:
        torch_private.refuse_tangents(args)
        return self._run(*self.swap(args))

    @classmethod
    def serialize_compile_artifacts(cls, fn: "CompiledGraph") -> bytes:
        """Raises:
        RuntimeError: a weight is in float; what would quantise it again is not written.
        """
        return pickle.dumps(
            {
                "devices": sorted(fn.devices),
                "made by": _made_by(fn.devices),
                "swap": fn.swap.saved(),
                "below autograd": fn.is_below_autograd,
                "compiled": torch_private.serialize_compiled(fn.compiled),
            }
        )

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> "CompiledGraph":
        """Raises:
        RuntimeError: another int8fx wrote the file, or one on another kind of machine.
        """
        saved = pickle.loads(data)
        here = _made_by(saved.get("devices", ()))  # another version may have written less
        if saved["made by"] != here:
            raise RuntimeError(
                f"the compiled graph was written by {saved['made by']}, and this is {here}"
            )
        swap = WeightSwap.of_saved(saved["swap"], STORE)
        compiled = torch_private.deserialize_compiled(saved["compiled"])
        return cls(swap, compiled, saved["devices"], saved["below autograd"])

    def finalize_loading(self, vllm_config: Any) -> None:
        """What vLLM calls on each compiled function that it has loaded: nothing is left to do."""


def _made_by(devices: Collection[str]) -> tuple[str, str]:
    """The sources, and the kernels, whose packed weights the code takes."""
    return cache_identity(), str(table.describe(devices))
