"""Runs the tiers of ``tests/gpuless``, each in a process of its own, which it patches for good."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# Of a file, which tests; what compiles takes longest, and is dealt out to three processes.
TIERS = {
    "compiled, Ampere": ("compiled", "sm_8"),
    "compiled, AMD": ("compiled", "gfx"),
    "compiled, others": ("compiled", "not sm_8 and not gfx"),
    "alignment": ("alignment", ""),
    "executed": ("executed", ""),
    "launches": ("launches", ""),
    "kernels": ("kernels", ""),
    "rotated_kernels": ("rotated_kernels", ""),
    "rotated": ("rotated", ""),
    "grouped_kernels": ("grouped_kernels", ""),
    "grouped": ("grouped", ""),
    "expert_kernels": ("expert_kernels", ""),
    "rounding": ("rounding", ""),
    "order": ("order", ""),
    "tile_tables": ("tile_tables", ""),
    "harness": ("harness", ""),
}

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="fakes a GPU, and this machine has one"),
]


@pytest.mark.parametrize("tier", TIERS)
def test_tier(tier: str) -> None:
    pytest.importorskip("triton")
    file, which = TIERS[tier]
    command = [sys.executable, "-m", "pytest", f"tests/gpuless/test_{file}.py", "-k", which]
    # Dynamo traces to the log at DEBUG, which pytest would keep for every test.
    options = ["-q", "-p", "no:logging", "-p", "no:cacheprovider", "-W", "ignore"]
    # One thread: other tests run beside this one, and interpreted kernels are Python.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # With it set, torch cannot trace a triton_op; the harness interprets by itself.
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        command + options, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
