"""Which ranges of memory overlap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiostage._capture.plan import overlapping


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=20))
def test_ranges_that_overlap_are_grouped_and_no_others(spans: list[tuple[int, int]]) -> None:
    starts = [0 if not size else 1 + start for start, size in spans]
    stops = [start + size for start, (_, size) in zip(starts, spans, strict=True)]
    parent = list(range(len(spans)))

    def root(index: int) -> int:
        return index if parent[index] == index else root(parent[index])

    for one in range(len(spans)):
        for other in range(one):
            if max(starts[one], starts[other]) < min(stops[one], stops[other]):
                parent[root(one)] = root(other)
    together: dict[int, set[int]] = {}
    for index in range(len(spans)):
        together.setdefault(root(index), set()).add(index)
    expected = {frozenset(members) for members in together.values() if len(members) > 1}
    found = list(overlapping(starts, stops))
    assert {frozenset(members) for members in found} == expected
    assert sum(map(len, found)) == sum(map(len, expected))
    for members in found:
        assert [starts[number] for number in members] == sorted(starts[number] for number in members)
        for place, number in enumerate(members[1:], 1):
            assert any(stops[before] > starts[number] for before in members[:place]), "each overlaps with one before it"


@pytest.mark.parametrize("count", [0, 1])
def test_few_ranges(count: int) -> None:
    assert list(overlapping([4096] * count, [5000] * count)) == []
