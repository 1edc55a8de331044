"""ConvRot's int8 files, as ComfyUI writes them, against the matrix of their paper."""

import json

import pytest
import torch
from torch import Tensor, nn

import int8fx
from int8fx.errors import CheckpointError
from int8fx.weights import convrot

N, K = 24, 128
REGULAR_4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double()


def file_of(weight: Tensor, block: int, per_row: bool = True) -> dict[str, Tensor]:
    """What a writer of such files does, by the definition: ``W Hᵀ`` in groups, then absmax int8."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < block:
        H = torch.kron(H, REGULAR_4)
    groups = weight.double().unflatten(1, (-1, block)) @ (H / block**0.5).t()
    rotated = groups.flatten(1)
    absmax = rotated.abs().amax(1) if per_row else rotated.abs().amax()
    scale = (absmax / 127).float()
    w_int8 = (rotated / (scale.unsqueeze(1) if per_row else scale)).round().to(torch.int8)
    said = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": block}
    said |= {"per_row": True} if per_row else {}
    marker = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return {"weight": w_int8, "weight_scale": scale, "comfy_quant": marker}


def linear(**options) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(K, N, bias=False).requires_grad_(False)
    return int8fx.quantize_(made, scheme="int8-rotated", **options) if options else made


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("block", [16, 64])
def test_a_file_is_read_as_the_weight_that_it_is_of(block, per_row):
    floats = linear()
    read = linear(block=block, rotation="convrot")
    read.weight.data.copy_(torch.zeros(N, K))
    read.load_state_dict(file_of(floats.weight, block, per_row))
    step = read.weight.w_scale.max() * block**0.5
    assert (read.weight.dequantize() - floats.weight).abs().max() <= step
    x = torch.randn(5, K)
    assert (read(x) - floats(x)).norm() < 0.02 * floats(x).norm()
    other = linear(block=block)  # hadamard is the same matrix
    other.load_state_dict(file_of(floats.weight, block, per_row))
    assert torch.equal(other(x), read(x))


@pytest.mark.parametrize("block", [16, 64])
def test_what_is_written_is_what_a_writer_writes(block):
    written = convrot.state_dict(linear(block=block, rotation="convrot"))
    expected = file_of(linear().weight, block)
    assert written.keys() == expected.keys()
    # The two round a rotation in fp32 and one in fp64.
    differences = written["weight"].int() - expected["weight"].int()
    assert differences.abs().max() <= 1 and (differences != 0).float().mean() < 0.01
    torch.testing.assert_close(written["weight_scale"], expected["weight_scale"])
    assert json.loads(bytes(written["comfy_quant"].tolist()))["convrot_groupsize"] == block


def test_written_and_read_are_the_same_bits():
    model = linear(block=64, rotation="convrot")
    again = linear(block=64, rotation="convrot")
    again.weight.data.copy_(torch.zeros(N, K))
    again.load_state_dict(convrot.state_dict(model))
    x = torch.randn(5, K)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"format": "int4_convrot"}, "int4_convrot.*is read"),
        ({"format": "int8_tensorwise"}, "int8_tensorwise with convrot is read"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 32}, "groups of 32"),
        (
            {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
            "do not divide K=128",
        ),
        ([], "damaged"),
    ],
)
def test_other_files_are_named(said, words):
    state = file_of(linear().weight, 64)
    state["comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    model = linear(block=64)
    before = model.weight.dequantize()
    with pytest.raises(CheckpointError, match=words):
        model.load_state_dict(state)
    assert torch.equal(model.weight.dequantize(), before)


def test_blocks_of_another_size_are_named():
    with pytest.raises(
        CheckpointError, match=r"blocks of 64.*in the checkpoint.*blocks of 16.*in the model"
    ):
        linear(block=16, rotation="convrot").load_state_dict(file_of(linear().weight, 64))


@pytest.mark.parametrize("options", [{"columns": [3]}, {"block": 32}, {"rotation": "random-signs"}])
def test_what_such_files_cannot_hold_is_named(options):
    with pytest.raises(ValueError, match=r"weight is int8 per channel.*ConvRot's files hold"):
        convrot.state_dict(linear(**options))
