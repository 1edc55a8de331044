"""state_dict, safetensors, loading on the meta device; and what a bad checkpoint is told."""

import copy
import json
import re

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import int8fx
from int8fx import Int8Weight
from int8fx.errors import CheckpointError
from int8fx.kernels.ops.quantize_reference import quantize_weight

K, N = 64, 96


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(K)
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K, bias=False)
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


@pytest.fixture
def floats():
    torch.manual_seed(0)
    return Model().bfloat16().eval().requires_grad_(False)


@pytest.fixture
def model(floats):
    return int8fx.quantize_(copy.deepcopy(floats), threshold=5.0)


@pytest.fixture
def x():
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1)).bfloat16()


def empty(device="cpu"):
    with torch.device(device):
        model = Model().bfloat16().eval().requires_grad_(False)
    model.scratch = torch.ones(3)
    return int8fx.quantize_(model, threshold=5.0)


def snapshot(model):
    return {name: (id(t), t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}


def assert_unchanged(model, before):
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        identity, values = before[name]
        assert identity == id(tensor)
        assert torch.equal(values, tensor)


def test_the_entries_are_plain_tensors_that_do_not_depend_on_the_device(floats, model):
    state = model.state_dict()
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    w_int8, w_scale = quantize_weight(floats.up.weight)
    assert torch.equal(state["up.weight"], w_int8.unsqueeze(0))
    assert torch.equal(state["up.weight_scale"], w_scale)
    assert set(state) - set(floats.state_dict()) == {"up.weight_scale", "down.weight_scale"}


@pytest.mark.parametrize("strict", [True, False])
def test_no_float_model_takes_the_integers_for_its_values(floats, model, strict):
    before = floats.up.weight.clone(), floats.down.weight.clone()
    with pytest.raises(RuntimeError) as error:
        floats.load_state_dict(model.state_dict(), strict=strict)
    for weight, shape in (("up", "96, 64"), ("down", "64, 96")):
        assert (
            f"size mismatch for {weight}.weight: copying a param with shape torch.Size([1, {shape}])"
            in str(error.value)
        )
    assert torch.equal(floats.up.weight, before[0]) and torch.equal(floats.down.weight, before[1])


def test_weights_in_their_own_shape_are_read_as_well(model, x):
    """What we wrote before."""
    state = model.state_dict()
    state = {n: t.squeeze(0) if t.dtype == torch.int8 else t for n, t in state.items()}
    read = empty()
    read.load_state_dict(state)
    assert torch.equal(read(x), model(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shard", ["5GB", 5000])
def test_round_trip_bit_for_bit(model, x, tmp_path, device, shard):
    int8fx.save_checkpoint(model, tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard == "5GB" else 3)
    read = int8fx.load_checkpoint(empty(device), tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name
    assert torch.equal(read(x), model(x))
    assert type(read.up.weight) is Int8Weight and not read.up.weight.requires_grad


class Floats(TorchDispatchMode):
    """What makes float tensors of the size of a weight, outside of the meta device."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            plain = isinstance(tensor, torch.Tensor) and not isinstance(tensor, Int8Weight)
            if plain and tensor.is_floating_point() and tensor.numel() >= N * K and not tensor.is_meta:
                self.made.append(func)
        return out


def test_on_meta_no_float_copy_of_a_weight_is_made(floats, model, x, tmp_path):
    int8fx.save_checkpoint(model, tmp_path / "int8")
    int8fx.save_checkpoint(floats, tmp_path / "floats")
    with Floats() as seen:
        read = int8fx.load_checkpoint(empty("meta"), tmp_path / "int8")
    assert not seen.made and torch.equal(read(x), model(x))
    with Floats() as seen:
        int8fx.load_checkpoint(empty("meta"), tmp_path / "floats")
    assert seen.made  # it does see them


@pytest.mark.parametrize("assign", [True, False])
def test_load_state_dict_alone(model, x, assign):
    state = safetensors.torch.load(safetensors.torch.save(model.state_dict()))
    keys = set(state)
    read = empty()
    result = read.load_state_dict(state, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert set(state) == keys
    assert torch.equal(read(x), model(x))


def test_inside_a_larger_model(model, x):
    outer = nn.ModuleDict({"inner": model})
    read = nn.ModuleDict({"inner": empty()})
    read.load_state_dict(outer.state_dict())
    assert torch.equal(read["inner"](x), model(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_float_weights_are_quantised_as_they_are_read(floats, model, x, tmp_path, device):
    int8fx.save_checkpoint(floats, tmp_path)
    read = int8fx.load_checkpoint(empty(device), tmp_path / "model.safetensors")
    assert torch.equal(read(x), model(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_int8_values_are_not_copied_into_a_float_model(floats, model, tmp_path, device):
    int8fx.save_checkpoint(model, tmp_path)
    before = {name: tensor.clone() for name, tensor in floats.state_dict().items()}
    message = r"weight: torch.int8 in the checkpoint, torch.bfloat16 in the model; int8fx.quantize_"
    with pytest.raises(CheckpointError, match=message):
        int8fx.load_checkpoint(floats.to(device), tmp_path)
    if device == "cpu":
        assert all(torch.equal(tensor, before[name]) for name, tensor in floats.state_dict().items())


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_torch_distributed_checkpoint_takes_the_state_dict(model, x, tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    checkpoint.save(model.state_dict(), checkpoint_id=tmp_path)
    read = empty()
    state = read.state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path)
    read.load_state_dict(state)
    assert torch.equal(read(x), model(x))
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'weight_scale'"):
        get_model_state_dict(model)


def test_what_is_read_is_no_view_of_the_file(model, x, tmp_path):
    int8fx.save_checkpoint(model, tmp_path)
    read = int8fx.load_checkpoint(empty("meta"), tmp_path)
    expected = read(x)
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(read(x), expected)


def test_tied_weights_stay_tied(x, tmp_path):
    def tied(device="cpu"):
        with torch.device(device):
            linears = [nn.Linear(*sizes) for sizes in ((K, N), (N, K), (K, 10), (10, K), (K, N))]
            model = nn.Sequential(nn.Embedding(10, K), *linears)
        model[3].weight, model[5].weight = model[0].weight, model[1].weight
        return int8fx.quantize_(model.requires_grad_(False))

    model = tied()
    int8fx.save_checkpoint(model, tmp_path)
    read = int8fx.load_checkpoint(tied("meta"), tmp_path)
    assert read[3].weight is read[0].weight
    assert read[5].weight is read[1].weight and type(read[1].weight) is Int8Weight
    tokens = torch.arange(4)
    assert torch.equal(read(tokens), model(tokens))


# --- bad checkpoints -----------------------------------------------------------------------------


def missing(state):
    del state["up.bias"]


def missing_scale(state):
    del state["down.weight_scale"]


def missing_int8(state):
    del state["down.weight"]


def unexpected(state):
    state["extra.weight"] = torch.ones(2)


def other_shape(state):
    state["up.weight"] = state["up.weight"][:, :-1].contiguous()


def other_scale(state):
    state["up.weight_scale"] = state["up.weight_scale"][:-1].contiguous()


def other_norm(state):
    state["norm.running_mean"] = torch.ones(K + 1)


def other_dtype(state):
    state["up.weight"] = state["up.weight"].to(torch.int32)


def int8_norm(state):
    state["norm.weight"] = state["norm.weight"].to(torch.int8)


def nan_scale(state):
    state["down.weight_scale"][3] = float("nan")


def negative_scale(state):
    state["down.weight_scale"][3] *= -1


def impossible_value(state):
    state["down.weight"][0, 3, 5] = -128


# Of those, load_state_dict leaves names to torch, which tells missing from unexpected after loading.
NAMES = {
    missing: "up.bias: in the model, and missing in the checkpoint",
    unexpected: "extra.weight: in the checkpoint, and not in the model",
}
VALUES = {
    missing_scale: "down.weight: int8 values without their scales, down.weight_scale or down.SCB",
    missing_int8: "down.weight: its scales are there, and its int8 values are missing",
    other_shape: "up.weight: shape [95, 64] in the checkpoint, [96, 64] in the model",
    other_scale: "up.weight: scales of shape [95], [96] expected",
    other_norm: "norm.running_mean: shape [65] in the checkpoint, [64] in the model",
    other_dtype: "up.weight: torch.int32 in the checkpoint; allowed: int8, or a float",
    int8_norm: "norm.weight: torch.int8 in the checkpoint, torch.bfloat16 in the model",
    nan_scale: "down.weight: corrupt: a scale that is not finite, or not above 0",
    negative_scale: "down.weight: corrupt: a scale that is not finite, or not above 0",
    impossible_value: "down.weight: corrupt: a value of -128, where int8 weights end at -127",
}


@pytest.mark.parametrize("spoil", [*NAMES, *VALUES], ids=lambda spoil: spoil.__name__)
def test_a_bad_checkpoint_is_named_and_changes_nothing(model, tmp_path, spoil):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spoil(state)
    target = empty()
    before = snapshot(target)
    message = re.escape((NAMES | VALUES)[spoil])
    if spoil in VALUES:
        with pytest.raises(CheckpointError, match=message):
            target.load_state_dict(state)
        assert_unchanged(target, before)
    if spoil is missing_int8:
        message = "down.weight: in the model, and missing in the checkpoint"
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        int8fx.load_checkpoint(target, tmp_path)
    assert_unchanged(target, before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-9000], "model.safetensors: broken off in down.weight"),
        (lambda content: content[:-1], "model.safetensors: broken off in "),
        (lambda content: content[:40], "model.safetensors: broken off in its header"),
        (lambda content: b"", "model.safetensors: broken off in its header"),
        (lambda content: content[:8] + b"x" + content[9:], "model.safetensors: its header is damaged"),
        (lambda content: content + b"x", "model.safetensors: .*not fully covered"),
    ],
)
def test_a_damaged_file_is_named_with_its_tensor(model, tmp_path, damage, message):
    int8fx.save_checkpoint(model, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    target = empty()
    before = snapshot(target)
    with pytest.raises(CheckpointError, match=message):
        int8fx.load_checkpoint(target, tmp_path)
    assert_unchanged(target, before)


def test_files_that_are_not_there(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor .*index"):
        int8fx.load_checkpoint(empty(), tmp_path)
    int8fx.save_checkpoint(model, tmp_path, max_shard_size=5000)
    shard = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]["up.bias"]
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_text()
    for damaged in (whole[:-40], "{}", "[]", '{"weight_map": 3}'):
        index.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"index\.json: damaged: no 'weight_map' of names"):
            int8fx.load_checkpoint(empty(), tmp_path)
    # An index that leaves a file out.
    places = json.loads(whole)["weight_map"]
    others = {name: file for name, file in places.items() if file != shard}
    index.write_text(json.dumps({"weight_map": others}))
    target = empty()
    before = snapshot(target)
    with pytest.raises(CheckpointError, match=r"norm\.weight: in the model, and missing"):
        int8fx.load_checkpoint(target, tmp_path)
    assert_unchanged(target, before)
    index.write_text(whole)
    (tmp_path / shard).unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard}, which is not there"):
        int8fx.load_checkpoint(empty(), tmp_path)


def moved_up(folder, shard):
    (folder / shard).rename(folder.parent / shard)
    return f"../{shard}"


def moved_away(folder, shard):
    (folder / shard).rename(folder.parent / shard)
    return str(folder.parent / shard)


def linked_from_above(folder, shard):
    (folder / shard).rename(folder.parent / shard)
    (folder / shard).symlink_to(folder.parent / shard)
    return shard


def in_a_linked_folder(folder, shard):
    (folder.parent / "other").mkdir()
    (folder / shard).rename(folder.parent / "other" / shard)
    (folder / "sub").symlink_to(folder.parent / "other")
    return f"sub/{shard}"


@pytest.mark.parametrize("place", [moved_up, moved_away, linked_from_above, in_a_linked_folder])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(place, model, tmp_path):
    folder = tmp_path / "checkpoint"
    int8fx.save_checkpoint(model, folder, max_shard_size=5000)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    named = place(folder, places["up.bias"])
    renamed = {name: named if file == places["up.bias"] else file for name, file in places.items()}
    entry = min(name for name, file in renamed.items() if file == named)
    index.write_text(json.dumps({"weight_map": renamed}))
    target = empty()
    before = snapshot(target)
    message = re.escape(f"the entry {entry!r} names {named!r}, a file outside its folder")
    with pytest.raises(CheckpointError, match=message):
        int8fx.load_checkpoint(target, folder)
    assert_unchanged(target, before)


def test_shards_in_a_folder_below_and_in_the_hubs_cache_are_read(model, x, tmp_path):
    """The cache of huggingface_hub keeps blobs, and a folder of links to them for each revision."""
    blobs, snapshots = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    blobs.mkdir()
    snapshots.mkdir(parents=True)
    below = tmp_path / "below"
    int8fx.save_checkpoint(model, below, max_shard_size=5000)
    index = below / "model.safetensors.index.json"
    for file in below.iterdir():
        (blobs / f"hash-of-{file.name}").write_bytes(file.read_bytes())
        (snapshots / file.name).symlink_to(blobs / f"hash-of-{file.name}")
    places = json.loads(index.read_text())["weight_map"]
    (below / "shards").mkdir()
    for file in set(places.values()):
        (below / file).rename(below / "shards" / file)
    moved = {name: f"shards/{file}" for name, file in places.items()}
    index.write_text(json.dumps({"weight_map": moved}))
    for folder in (below, snapshots):
        assert torch.equal(int8fx.load_checkpoint(empty(), folder)(x), model(x))
