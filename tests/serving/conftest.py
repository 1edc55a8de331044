"""Tests of int8fx inside vLLM, for an environment that has it: ``.ci/nightly-serving`` makes one."""

import importlib.util
from pathlib import Path

import pytest

from int8fx.testing import serving

HERE = Path(__file__).parent
REASON = "needs vLLM for a CPU: .ci/nightly-serving makes an environment with it"


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.path.parent == HERE:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A Llama in bf16, on disk."""
    return serving.save(serving.tiny_llama(), tmp_path_factory.mktemp("models") / "bf16")


@pytest.fixture(scope="session")
def calibration(tmp_path_factory):
    """The file of that model's calibration."""
    return serving.calibrated(
        serving.tiny_llama(), tmp_path_factory.mktemp("calibrations") / "bf16.json"
    )
