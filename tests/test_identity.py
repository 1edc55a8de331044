"""Snapshots see whatever may have changed a tensor's values; both kinds see the same."""

import pytest
import torch
from torch import nn

from int8fx.kernels.cpu import int8_linear as cpu
from int8fx.weights.identity import (
    ALL_SETS,
    CompiledSnapshot,
    Snapshot,
    snapshot,
)


@pytest.fixture(params=[Snapshot, CompiledSnapshot])
def kind(request):
    if request.param is CompiledSnapshot and (reason := cpu.load()):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def tensors():
    return [nn.Parameter(torch.randn(3, 2)), torch.randn(4), torch.randn(0), torch.randn(4, 4)]


def in_place(tensors):
    with torch.no_grad():
        tensors[0].mul_(2)


def through_a_view(tensors):
    tensors[1][:2].zero_()


def data(tensors):
    tensors[0].data = torch.randn(3, 2)


def data_there_and_back(tensors):
    tensors[1].data = tensors[1].data.double()
    tensors[1].data = tensors[1].data.float()


def another_tensor(tensors):
    tensors[1] = tensors[1].detach()


def another_order(tensors):
    tensors.reverse()


def transposed(tensors):
    tensors[3].data = tensors[3].data.t()


def another_offset(tensors):
    tensors[1].data = torch.cat([tensors[1], tensors[1]])[:4]


def another_dtype(tensors):
    tensors[1].data = tensors[1].data.view(torch.int32)


def negated_lazily(tensors):
    tensors[1].data = torch._neg_view(tensors[1].data)


def other_bits(tensors):
    tensors[0].data[1, 1] += 1


def the_first(tensors):
    tensors[3].data[0, 0] += 1


def the_last(tensors):
    tensors[3].data[-1, -1] += 1


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        through_a_view,
        data,
        data_there_and_back,
        another_tensor,
        another_order,
        transposed,
        another_offset,
        another_dtype,
        negated_lazily,
        other_bits,
        the_first,
        the_last,
    ],
    ids=lambda change: change.__name__,
)
def test_a_change_is_seen(kind, tensors, change):
    before = kind(tensors)
    change(tensors)
    assert not before.matches(tensors)
    assert kind(tensors).matches(tensors)


def test_an_offset_and_strides_of_one_storage_are_told_apart(kind):
    bank = torch.randn(2, 8, 8).repeat_interleave(2, 0)  # 0 and 1 have the same values
    tensors = [nn.Parameter(bank[0])]
    before = kind(tensors)
    tensors[0].data = bank[1]
    assert not before.matches(tensors, sets=0)
    tensors[0].data = bank[0]
    assert before.matches(tensors)
    tensors[0].data = bank[0].t()
    assert not before.matches(tensors, sets=0)


def test_reading_is_no_change(kind, tensors):
    before = kind(tensors)
    tensors[1].sum()
    assert before.matches(tensors)
    assert before.matches(list(tensors))


def test_several_snapshots_are_joined(kind, tensors):
    joined = kind.joined([kind([tensor]) for tensor in tensors])
    assert joined.matches(tensors)
    assert not joined.matches(tensors[::-1])
    tensors[3].data.neg_()
    assert not joined.matches(tensors) and joined.matches(tensors, sets=0)


def test_inference_tensors_have_no_version_but_content(kind):
    with torch.inference_mode():
        tensors = [torch.randn(2)]
        before = kind(tensors)
        assert before.matches(tensors)
        assert not before.matches([torch.randn(2)])
        tensors[0].mul_(2)
        assert not before.matches(tensors)


def test_the_compiled_kind_serves_where_there_is_a_compiler(tensors):
    assert isinstance(snapshot(tensors), Snapshot if cpu.load() else CompiledSnapshot)


# --- content --------------------------------------------------------------------------------------

LARGE = {
    "contiguous": lambda: torch.randn(300, 257),
    "not on a line": lambda: torch.randn(300 * 257 + 5)[5:].view(300, 257),
    "transposed": lambda: torch.randn(257, 300).t(),
    "columns": lambda: torch.randn(300, 600)[:, 7:264],
    "every other": lambda: torch.randn(300, 600)[:, ::2],
    "permuted": lambda: torch.randn(10, 30, 257).permute(2, 0, 1),
    "expanded": lambda: torch.randn(300, 257).unsqueeze(1).expand(-1, 5, -1),
    "overlapping": lambda: torch.randn(3000).as_strided((500, 257), (5, 1)),
    "a vector": lambda: torch.randn(77_777),
    "few rows": lambda: torch.randn(2, 40_000)[:, 1:],
    "short rows": lambda: torch.randn(9000, 16)[:, :3],
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool)


def memory(tensor):
    """The bytes of its storage, and where in there its first and its last element are."""
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset() * tensor.itemsize
    return whole, first, first + steps * tensor.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LARGE)
def test_the_ends_and_a_change_of_all_are_in_every_set(kind, layout, dtype):
    torch.manual_seed(0)
    made = LARGE[layout]()
    form = made.shape, made.stride(), made.storage_offset()
    base = torch.randn(made.untyped_storage().nbytes() // 4).to(dtype)
    tensor = base.as_strided(*form)
    whole, first, last = memory(tensor)
    # A bit of one element; of all; the signs of all, which are the top bits of words.
    for where, bit in ((first, 1), (last, 1), (slice(None), 1), (slice(None), 128)):
        before = kind([tensor])
        whole[where] ^= bit
        assert all(not before.matches([tensor], 1, number) for number in range(2 * ALL_SETS))
        assert before.matches([tensor], 0)


def test_the_sign_of_all_alone_is_seen(kind):
    """A sum of products modulo 2^64 would lose the top bits of words in pairs."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for numel in (16, 1000, 80_000):
            tensor = torch.randn(numel).to(dtype)
            before = kind([tensor])
            tensor.data.neg_()
            assert all(not before.matches([tensor], 1, number) for number in range(ALL_SETS))


def test_a_write_beside_a_tensor_is_no_change(kind):
    """What lies in the gaps of a view is not its content."""
    base = torch.randn(300, 600)
    for view in (base[:, 7:264], base[:, ::2], base[::3], base[10:200]):
        view = view.data  # which has a version of its own
        before = kind([view])
        kept = view.clone()
        base.data.add_(1)
        view.data.copy_(kept)
        assert before.matches([view])


def test_a_small_update_in_bfloat16_is_seen_where_one_element_in_a_hundred_moves(kind):
    """The rest rounds to what it was. Each weight is asked for one set of samples, as at a call."""
    torch.manual_seed(0)
    seen = []
    for turn in range(200):
        weight = torch.randn(192, 256).bfloat16()
        before = kind([weight])
        moved = torch.rand(weight.shape) < 0.01
        weight.data[moved] *= 1.01
        assert not before.matches([weight])
        seen.append(not before.matches([weight], 1, turn))
    # 0.99^512 = 0.6 % are not: 1.2 of 200 are expected, and 9 with a probability of 10^-5.
    assert sum(seen) >= 192


def test_other_sets_see_what_one_does_not():
    if reason := cpu.load():
        pytest.skip(reason)
    weight = torch.zeros(512, 512)
    before = CompiledSnapshot([weight])
    found = set()
    for line in range(0, weight.numel(), 16):
        weight.data.view(-1)[line] = 1.0
        found.add(tuple(before.matches([weight], 1, first) for first in range(ALL_SETS)))
        weight.data.view(-1)[line] = 0.0
    # Each set has lines of its own, and only the ends are in all.
    alone = {tuple(first != number for first in range(ALL_SETS)) for number in range(ALL_SETS)}
    assert alone <= found and (False,) * ALL_SETS in found and (True,) * ALL_SETS in found


def test_all_sets_of_a_weight_with_a_gradient_are_compared():
    if reason := cpu.load():
        pytest.skip(reason)
    weight = nn.Parameter(torch.zeros(512, 512))
    before = CompiledSnapshot([weight])
    flat = weight.data.view(-1)
    for line in range(16, weight.numel() - 16, 16):
        flat[line] = 1.0
        if before.matches([weight], 1, 0) and not before.matches([weight]):
            break
        flat[line] = 0.0
    assert before.matches([weight], 1, 0)
    weight.grad = torch.zeros_like(weight)
    assert not before.matches([weight], 1, 0) and before.matches([weight], 0, 0)


def test_of_a_small_tensor_every_element_is_compared(kind):
    for tensor in (torch.randn(1000), torch.randn(8, 200)[:, 3:60], torch.randn(60)[::4]):
        for index in range(tensor.numel()):
            before = kind([tensor])
            where = torch.unravel_index(torch.tensor(index), tensor.shape)
            tensor.data[where] += 1
            assert not before.matches([tensor], 1, index)


def test_nan_is_equal_to_itself(kind):
    tensors = [torch.full((100, 100), float("nan"))]
    before = kind(tensors)
    assert before.matches(tensors)
    tensors[0].data.view(torch.int32).add_(1)  # another NaN
    assert not before.matches(tensors)


def test_what_cannot_be_read_is_compared_by_its_state(kind):
    shrunk = torch.randn(100, 100)
    shrunk.untyped_storage().resize_(0)
    cut = torch.randn(100, 100)
    cut.untyped_storage().resize_(5000)
    tensors = [
        torch.empty(100, 100, device="meta"),
        torch.empty(0, 7),
        torch.randn(()),
        shrunk,
        cut,
        torch.randn(4, 4, dtype=torch.complex64).conj(),
    ]
    assert kind(tensors).matches(tensors)
    for index in range(len(tensors)):
        others = list(tensors)
        others[index] = tensors[index].clone() if index not in (3, 4) else torch.randn(100, 100)
        assert not kind(tensors).matches(others)


def test_a_storage_that_lost_its_memory_is_not_read(kind):
    tensors = [torch.randn(100, 100)]
    before = kind(tensors)
    tensors[0].untyped_storage().resize_(0)
    assert not before.matches(tensors)
    tensors[0].untyped_storage().resize_(40_000)
    tensors[0].data.zero_()
    assert not before.matches(tensors)


def test_the_compiled_kind_takes_tensors_of_other_kinds():
    if reason := cpu.load():
        pytest.skip(reason)
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode().from_tensor(torch.randn(100, 100))
    sparse = torch.eye(4).to_sparse()
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)])
    others = [fake, sparse, nested]
    before = CompiledSnapshot(others)
    assert before.matches(others) and not before.matches(others[::-1])


@pytest.mark.parametrize("count", [1, 3])
def test_a_snapshot_of_other_numbers_of_tensors_is_refused(count):
    if reason := cpu.load():
        pytest.skip(reason)
    two = [torch.randn(3), torch.randn(3)]
    with pytest.raises(RuntimeError, match=f"the snapshot is of (fewer|more) than {count} tensors"):
        CompiledSnapshot(two).matches([*two, torch.randn(3)][:count])
