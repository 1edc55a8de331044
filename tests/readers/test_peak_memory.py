"""A checkpoint is read straight into packed weights: memory peaks little above them."""

import subprocess
import sys

import pytest

from int8fx.testing import foreign_files
from int8fx.testing.foreign_files import Foreign

MODULES, N, K = 160, 512, 1024
SAMPLES = foreign_files.samples()

SCRIPT = """
import pathlib, sys
import torch
from torch import nn
import int8fx
from int8fx.weights.tensor import QuantizedWeight

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

with torch.device("meta"):
    linears = (nn.Linear({K}, {N}, bias=False, dtype=torch.bfloat16) for _ in range({MODULES}))
    model = nn.ModuleList(linears)
small = nn.ModuleDict({{"up": nn.Linear({K}, 64, bias=False)}}).requires_grad_(False)
int8fx.load_checkpoint(small, sys.argv[2])  # what is imported and allocated once
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
before = status("VmRSS")
int8fx.load_checkpoint(model.requires_grad_(False), sys.argv[1])
packed = sum(each.int8_bytes for each in model.parameters() if isinstance(each, QuantizedWeight))
print((status("VmHWM") - before) / packed)
"""


@pytest.mark.parametrize("name", ["gptq-4-v1", "awq-gemm", "nf4", "compressed-tensors-w8a8"])
def test_memory_peaks_a_fifth_above_the_packed_model(name, tmp_path):
    """Unpacked integers of one weight come on top, which are a hundredth of this model."""
    one = SAMPLES[name](16, K)
    rows = N // 16
    tall = {key: _repeated(key, tensor, rows) for key, tensor in one.tensors.items()}
    modules = {str(index): Foreign(tall, one.w_hat, one.config) for index in range(MODULES)}
    large = foreign_files.write(tmp_path / "large", modules, {})
    small = foreign_files.write(tmp_path / "small", {"up": SAMPLES[name](64, K)}, {})
    script = SCRIPT.format(K=K, N=N, MODULES=MODULES)
    found = subprocess.run(
        [sys.executable, "-c", script, str(large), str(small)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert float(found.stdout) <= 1.2


def _repeated(name: str, tensor, rows: int):
    """More rows of the weight, which are the columns of GPTQ's and AWQ's tensors."""
    if name in ("g_idx", "weight.quant_map"):
        return tensor
    if name.startswith("weight.quant_state"):
        return foreign_files.nf4_state(16 * rows, K)
    if name in ("qweight", "qzeros", "scales"):
        return tensor.repeat(1, rows)
    return tensor.repeat(rows, *[1] * (tensor.dim() - 1))
