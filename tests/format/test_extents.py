"""How far tensors reach."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from aiostage.format.parts import extent_of


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=4))
def test_an_extent_ends_behind_the_last_element(dimensions: list[tuple[int, int]]) -> None:
    shape, stride = [size for size, _ in dimensions], [step for _, step in dimensions]
    numbers = torch.arange(100).as_strided(shape, stride)
    assert extent_of(shape, stride) == (int(numbers.max()) + 1 if numbers.numel() else 0)
