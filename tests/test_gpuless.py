"""Runs the tiers of ``tests/gpuless``, each in a process of its own, which it patches for good."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TIERS = ("compiled", "executed", "launches", "kernels", "rounding", "harness")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="fakes a GPU, and this machine has one"),
]


def _run(tier: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", f"tests/gpuless/test_{tier}.py"]
    # Dynamo traces to the log at DEBUG, which pytest would keep for every test.
    options = ["-q", "-p", "no:logging", "-p", "no:cacheprovider", "-W", "ignore"]
    # One thread: two tiers run at a time, and interpreted kernels are Python.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # With it set, torch cannot trace a triton_op; the harness interprets by itself.
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        command + options, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def tiers() -> Iterator[dict[str, Future]]:
    """All tiers, started at once, as many at a time as there are processors."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield {tier: pool.submit(_run, tier) for tier in TIERS}


@pytest.mark.parametrize("tier", TIERS)
def test_tier(tier: str, tiers: dict[str, Future]) -> None:
    pytest.importorskip("triton")
    done = tiers[tier].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
