"""On what the steps run: a GPU, with the shapes that count; or, rehearsed, this CPU with tiny ones."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu_day.shapes import CASES, LAYERS, Cases, Layer


@dataclass(frozen=True)
class Place:
    """Where, and how large.

    Attributes:
        tokens, decode_tokens: rows of the layers' activations.
        limits: M, N and K of products in float.
        llama: sizes of the decoder; layers of the one that is timed, and of the one that is replayed.
        lengths: of the prompts that are replayed.
        prompt, batches, capacity: of the decoder that is timed: tokens of its prefill, sequences that
            it decodes, and the places of its KV cache.
        processes: that share the work of a step.
        tests: pytest's arguments.
    """

    device: str
    layers: tuple[Layer, ...]
    tokens: tuple[int, ...]
    decode_tokens: tuple[int, ...]
    limits: tuple[tuple[int, int, int], ...]
    cases: Cases
    llama: dict[str, int]
    depths: tuple[int, int]
    prompt: int
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    capacity: int
    processes: int
    tests: tuple[str, ...]
    tile_classes: tuple[int, ...] = (64, 128, 256, 512, 1024, 4096)
    copied: int = 2**32

    @property
    def rehearses(self) -> bool:
        return self.device == "cpu"

    def torch(self) -> Any:
        """torch, whose tensors are made here."""
        import torch

        torch.manual_seed(0)
        torch.set_default_device(self.device)
        return torch

    def synchronize(self) -> None:
        import torch

        if not self.rehearses:
            torch.cuda.synchronize()

    def microseconds(self, call: Callable[[], Any], milliseconds: int = 60) -> float:
        """Of one call, the median; L2 is cleared before each. In a rehearsal, of a single call."""
        if self.rehearses:
            began = time.perf_counter()
            call()
            return round(1e6 * (time.perf_counter() - began), 2)
        from triton.testing import do_bench

        return round(1e3 * do_bench(call, warmup=15, rep=milliseconds, return_mode="median"), 2)

    def replayed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """A CUDA graph of one call; in a rehearsal the call itself."""
        import torch

        if self.rehearses:
            return functools.partial(_without_gradients, call)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            call()
        return graph.replay


def _without_gradients(call: Callable[[], Any]) -> Any:
    import torch

    with torch.no_grad():
        return call()


GPU = Place(
    device="cuda",
    layers=LAYERS,
    tokens=(32, 128, 512, 1024, 2048, 4096, 8192),
    decode_tokens=(1, 4, 16),
    limits=(
        (8192, 8192, 8192),
        (4096, 28672, 4096),
        (4096, 6144, 4096),
        (4096, 4096, 4096),
        (4096, 4096, 14336),
    ),
    cases=CASES,
    llama={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32001,
    },
    depths=(4, 2),
    prompt=2048,
    lengths=(96, 1, 8),
    batches=(1, 16),
    capacity=3072,
    processes=14,
    tests=("tests/test_gpu.py",),
)
REHEARSAL = Place(
    device="cpu",
    layers=(Layer("gate/up", (96, 64), 64),),
    tokens=(20,),
    decode_tokens=(1,),
    limits=((32, 32, 32),),
    cases=Cases(rows=(1, 9, 40), widths=((80,), (33, 7)), depths=(64,)),
    llama={
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
    depths=(1, 1),
    prompt=20,
    lengths=(20,),
    batches=(1,),
    capacity=64,
    processes=2,
    tests=("tests/gpuless/test_kernels.py", "-k", "candidate_rows or guard or residues"),
    tile_classes=(64,),
    copied=2**16,
)


def place(rehearses: bool) -> Place:
    return REHEARSAL if rehearses else GPU
