"""Makes this process believe in a GPU, and runs on CPU tensors, interpreted, what is launched on it."""

import contextlib
from collections.abc import Iterator
from typing import Any


def rehearse() -> None:
    """For good: the process is for this alone."""
    from int8fx.testing.gpuless.layers import serve_cpu_tensors_with_gpu_kernels
    from int8fx.testing.nogpu import fake_cuda
    from int8fx.testing.nogpu.interpreter import interpret_launches

    fake_cuda.install("H100")
    serve_cpu_tensors_with_gpu_kernels()
    interpret_launches()


@contextlib.contextmanager
def compiles(rehearses: bool) -> Iterator[None]:
    """Within it, ``torch.compile`` compiles for a GPU; rehearsed, for the one that is not there."""
    if not rehearses:
        yield
        return
    from int8fx.testing.nogpu.inductor import retargeted

    with retargeted():
        yield


def gpu_operators() -> Any:
    """Registers the kernels' operators."""
    import int8fx.kernels.gpu.experts
    import int8fx.kernels.gpu.normed  # noqa: F401
