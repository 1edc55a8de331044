"""Which tensors share memory."""

import random

import torch

from int8fx.weights.memory import AddressRange, AddressRanges, has_memory, merged

CPU = torch.device("cpu")


def test_an_overlap_is_found_among_any_others():
    drawn = random.Random(0)
    for _ in range(300):
        spans = [(start := drawn.randrange(40), start + drawn.randrange(6)) for _ in range(5)]
        memories = AddressRanges(AddressRange(CPU, *span) for span in spans)
        start = drawn.randrange(40)
        end = start + drawn.randrange(6)
        shared = any(set(range(*span)) & set(range(start, end)) for span in spans)
        assert memories.overlap(AddressRange(CPU, start, end)) == shared
        assert not memories.overlap(AddressRange(torch.device("meta"), start, end))


def test_ranges_that_overlap_by_way_of_others_are_merged():
    meta = torch.device("meta")
    spans = {"a": (CPU, 0, 4), "b": (CPU, 6, 9), "c": (CPU, 3, 7), "d": (CPU, 9, 12), "e": (meta, 5, 6)}
    found = merged((AddressRange(*span), name) for name, span in spans.items())
    assert found == [
        (AddressRange(CPU, 0, 9), ["a", "c", "b"]),
        (AddressRange(CPU, 9, 12), ["d"]),
        (AddressRange(meta, 5, 6), ["e"]),
    ]


def test_views_and_aliases_share_memory_and_copies_do_not():
    base = torch.randn(10, 8)
    for alias in (base.t(), base[3:5], base[:, ::2], torch.from_numpy(base.numpy()), base.data):
        assert AddressRanges([AddressRange.of(base)]).overlap(AddressRange.of(alias))
        assert AddressRanges([AddressRange.of(alias)]).overlap(AddressRange.of(base))
    for other in (base.clone(), base[:0], torch.empty(10, 8)):
        assert not AddressRanges([AddressRange.of(base)]).overlap(AddressRange.of(other))
    assert not AddressRanges([AddressRange.of(base[:5])]).overlap(AddressRange.of(base[5:]))
    assert not AddressRanges([]).overlap(AddressRange.of(base))


def test_a_tensor_whose_storage_was_cut_has_no_memory():
    tensor = torch.randn(10, 8)
    assert has_memory(tensor) and has_memory(tensor[2:, 3:]) and has_memory(tensor[:0])
    tensor.untyped_storage().resize_(100)
    assert not has_memory(tensor) and has_memory(tensor[:2])
    assert not has_memory(torch.eye(3).to_sparse())
