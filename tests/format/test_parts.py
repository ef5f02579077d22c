from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from aiostage.format.parts import (
    Content,
    Gap,
    Part,
    Scattered,
    cut,
    digest,
    digest_of_parts,
    gather,
    memory_of,
    parts_in,
    scatter,
    single_piece,
)

STEP = 64
"""A small part, so that everything crosses the ends of parts."""


def parts_of(contents: Sequence[Content], step: int = STEP) -> list[Part]:
    return cut(contents, step)


def buffer() -> torch.Tensor:
    return torch.full((4096,), 0xEE, dtype=torch.uint8)


def written(contents: Sequence[Content], step: int = STEP) -> bytes:
    """Put all parts together, as writing them would."""
    result = b""
    for index, part in enumerate(parts_of(contents, step)):
        assert part.index == index
        assert part.offset == len(result)
        place = buffer()
        gather(part, place)
        assert bytes(place[part.nbytes :].tolist()) == b"\xee" * (4096 - part.nbytes)
        result += bytes(place[: part.nbytes].tolist())
    return result


def in_index_order(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


@st.composite
def contents(draw: st.DrawFn) -> list[torch.Tensor]:
    """Tensors of falling element size, contiguous and not."""
    found = []
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        for _ in range(draw(st.integers(0, 2))):
            shape = draw(st.lists(st.integers(1, 7), max_size=3))
            count = int(np.prod(shape)) if shape else 1
            tensor = torch.arange(count, dtype=torch.int64).to(dtype).view(shape)
            order = draw(st.permutations(range(len(shape))))
            found.append(tensor.permute(*order) if shape else tensor)
    return found


class TestCut:
    def test_nothing_is_one_empty_part(self):
        (part,) = parts_of([])
        assert (part.index, part.offset, part.nbytes, part.pieces) == (0, 0, 0, [])

    def test_parts_are_equally_long_except_the_last(self):
        parts = parts_of([torch.zeros(150, dtype=torch.uint8), torch.zeros(50, dtype=torch.uint8)])
        assert [(part.offset, part.nbytes) for part in parts] == [(0, 64), (64, 64), (128, 64), (192, 8)]

    def test_a_full_last_part_is_the_last(self):
        assert [part.nbytes for part in parts_of([torch.zeros(128, dtype=torch.uint8)])] == [64, 64]

    def test_agrees_with_the_number_of_parts(self):
        for nbytes in (0, 1, 63, 64, 65, 128, 1000):
            assert len(parts_of([torch.zeros(nbytes, dtype=torch.uint8)])) == parts_in(nbytes, STEP)

    def test_does_not_copy_what_lies_in_order(self):
        tensor = torch.arange(100, dtype=torch.int64).view(10, 10)
        parts = parts_of([tensor])
        assert all(single_piece(part) is not None for part in parts)
        assert {piece.untyped_storage().data_ptr() for part in parts for piece in part.pieces} == {tensor.data_ptr()}  # type: ignore[union-attr]

    @given(contents(), st.sampled_from([8, 64, 256]))
    def test_loses_nothing(self, tensors: list[torch.Tensor], step: int):
        assert written(tensors, step) == b"".join(map(in_index_order, tensors))


class TestScattered:
    @pytest.mark.parametrize("shape", [(40,), (5, 8), (3, 1, 7), (1, 1), (2, 3, 4, 5)])
    def test_every_range_of_elements(self, shape: tuple[int, ...]):
        count = int(np.prod(shape))
        padded = torch.arange(count * 2 * len(shape), dtype=torch.int32)
        tensor = padded.as_strided(shape, tuple(2 * step for step in reversed(torch.empty(shape[::-1]).stride())))
        expected = tensor.contiguous().view(-1)
        for start in range(count):
            for stop in range(start + 1, count + 1, 3):
                place = torch.zeros((stop - start) * 4, dtype=torch.uint8)
                scattered = Scattered(tensor, start, stop)
                assert scattered.nbytes == place.numel()
                scattered.collect(place)
                assert torch.equal(place.view(torch.int32), expected[start:stop])


class TestScatter:
    @given(contents(), st.sampled_from([8, 64, 256]))
    def test_brings_back_what_was_gathered(self, tensors: list[torch.Tensor], step: int):
        tensors = [tensor.contiguous() for tensor in tensors]
        again = [torch.zeros_like(tensor) for tensor in tensors]
        for part, target in zip(parts_of(tensors, step), parts_of(again, step), strict=True):
            place = buffer()
            gather(part, place)
            scatter(target, place)
        assert all(map(torch.equal, tensors, again))

    def test_leaves_gaps_out(self):
        first, last = torch.zeros(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
        (part,) = parts_of([first, Gap(5), last])
        assert single_piece(part) is None
        scatter(part, torch.arange(20, dtype=torch.uint8))
        assert first.tolist() == [0, 1, 2, 3]
        assert last.tolist() == [9, 10, 11, 12]

    def test_a_part_of_gaps_only(self):
        first, second = parts_of([Gap(100)])
        assert (first.nbytes, second.nbytes) == (64, 36)
        assert single_piece(first) is None
        scatter(first, buffer())


class TestMemoryOf:
    def test_is_the_memory_itself(self):
        owner = torch.arange(10, dtype=torch.uint8)
        memory = memory_of(owner.data_ptr() + 2, 5, owner)
        owner[2] = 99
        assert memory.tolist() == [99, 3, 4, 5, 6]

    def test_keeps_its_owner_alive(self):
        owner = torch.arange(10, dtype=torch.uint8)
        gone = weakref.ref(owner)
        memory = memory_of(owner.data_ptr(), 10, [owner])[3:7]
        del owner
        gc.collect()
        assert gone() is not None
        assert memory.tolist() == [3, 4, 5, 6]
        del memory
        assert gone() is None


class TestDigest:
    def test_is_the_plain_digest_of_a_file_of_one_part(self):
        data = torch.arange(100, dtype=torch.uint8)
        assert digest(data.numpy().data) == xxhash.xxh3_64_hexdigest(bytes(range(100)))
        assert digest_of_parts([digest(data.numpy().data)]) == digest(data.numpy().data)

    def test_of_several_parts_depends_on_their_order(self):
        first, second = digest(memoryview(b"\0")), digest(memoryview(b"\1"))
        both: Any = {digest_of_parts([first, second]), digest_of_parts([second, first]), first, second}
        assert len(both) == 4
