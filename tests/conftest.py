"""Run beside others (``pytest -n auto``), a worker keeps to one thread."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


@pytest.fixture
def isa(request):
    """The instruction set of the CPU kernels: ``parametrize("isa", ..., indirect=True)``."""
    from int8fx.kernels.cpu import int8_linear as cpu

    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa("auto")
