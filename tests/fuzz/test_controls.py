"""The random tests find what is wrong: flawed stagers and flawed copies do not get through."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from typing import Any

import pytest
import torch

from aiostage.abc import CheckpointStager
from tests.fuzz import disturbing, naive
from tests.fuzz.choices import Choices, shrink
from tests.fuzz.describing import describe, difference, difference_of_cast
from tests.fuzz.staging import Mismatch, check_same
from tests.fuzz.trees import Grower


@pytest.mark.parametrize("flawed", [naive.SkewedVersions, naive.Unwitnessed, naive.Aliased])
def test_flawed_stagers_are_seen_to_mix_moments(flawed: type[CheckpointStager]) -> None:
    failures = asyncio.run(disturbing.check_seeds(lambda seed: flawed(), 60, 0, Counter()))
    assert sum("Disturbed" in failure for failure in failures) >= 5


def test_what_is_captured_beside_changes_and_what_is_torn_both_occur() -> None:
    results: Counter[str] = Counter()
    asyncio.run(disturbing.check_seeds(disturbing.make_stager, 60, 0, results))
    torn = sum(count for what, count in results.items() if what.endswith("torn"))
    captured = sum(count for what, count in results.items() if "captured beside changes" in what)
    assert torn >= 10
    assert captured >= 24


# PyTorch warns of quantized and compressed sparse tensors as such.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

BASE = torch.arange(8.0)
LIST = [1]


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ({"a": torch.ones(2)}, {"a": torch.zeros(2)}),
        ({"a": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.float64)}),
        ({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}),
        (torch.ones(2, 1).as_strided((2, 1), (1, 1)), torch.ones(2, 1).as_strided((2, 1), (1, 7))),
        ([LIST, LIST], [[1], [1]]),
        ([[1], [1]], [LIST, LIST]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ([1], [True]),
        ([1], (1,)),
        (torch.ones(1), torch.nn.Parameter(torch.ones(1))),
        (torch.ones(1), torch.ones(1).requires_grad_()),
        ({1, 2}, {1, 3}),
    ],
)
def test_differences_are_seen(expected: Any, found: Any) -> None:
    assert difference(describe(expected), describe(expected)) is None
    assert difference(describe(expected), describe(found)) is not None


def test_what_is_passed_through_and_was_copied_is_seen() -> None:
    source = [[1]]
    with pytest.raises(Mismatch, match="is a copy"):
        check_same(describe(source), describe(source), describe([[1]]))


def test_values_are_compared_after_a_cast() -> None:
    source = describe([torch.tensor([1.0, 1.001])])
    assert difference_of_cast(source, describe([torch.tensor([1.0, 1.0], dtype=torch.bfloat16)])) is None
    assert difference_of_cast(source, source) is None
    for wrong in (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([1, 1]), torch.tensor([1.0])):
        assert difference_of_cast(source, describe([wrong])) is not None
    assert difference_of_cast(describe([torch.tensor([1])]), describe([torch.tensor([1.0])])) is not None


def test_attributes_and_gradients_are_seen() -> None:
    plain, marked, other = torch.ones(1), torch.ones(1), torch.ones(1)
    marked.note = 1  # type: ignore[attr-defined]
    other.grad = torch.ones(1)
    for tensor in (marked, other):
        assert difference(describe(plain), describe(tensor)) is not None


def test_memory_that_is_shared_or_is_not_is_seen() -> None:
    tied = {"a": BASE[1:5].clone()}
    tied["b"] = tied["a"][1:3]
    apart = {"a": BASE[1:5].clone(), "b": BASE[2:4].clone()}
    source = {"a": BASE[1:5], "b": BASE[2:4]}
    check_same(describe(source), describe(tied), describe({"a": (x := BASE[1:5].clone()), "b": x[1:3]}))
    with pytest.raises(Mismatch, match="bytes shared"):
        check_same(describe(source), describe(tied), describe(apart))
    with pytest.raises(Mismatch, match="bytes shared"):
        check_same(describe(source), describe(apart), describe(tied))


def test_a_parameter_that_is_reached_by_another_path_in_its_copy_keeps_its_ties() -> None:
    view = torch.arange(4.0)
    holder = [view, torch.nn.Parameter(view)]
    outside = torch.nn.Parameter(torch.ones(1))
    # The copy of a Parameter has no attributes, so there the holder is met later.
    outside.inside = holder  # type: ignore[attr-defined]
    tree = {"outside": outside, "holder": holder}
    staged = {"outside": torch.nn.Parameter(torch.ones(1)), "holder": copy.deepcopy(holder)}
    expected = describe(copy.deepcopy(tree), bare=True)
    with pytest.raises(Mismatch, match="bytes shared"):
        check_same(describe(tree), expected, describe(staged, bare=True), describe(tree, bare=True))
    staged["holder"][1] = torch.nn.Parameter(staged["holder"][0])
    check_same(describe(tree), expected, describe(staged, bare=True), describe(tree, bare=True))


def test_a_part_of_the_source_is_seen() -> None:
    source, expected = [[1]], [[1]]
    with pytest.raises(Mismatch, match="the source's own"):
        check_same(describe(source), describe(expected), describe([source[0]]))


def test_trees_are_replayed_and_made_smaller() -> None:
    choices = Choices(5)
    one = describe(Grower(choices).tree())
    other = describe(Grower(Choices(5)).tree())
    assert [fact[0] for fact in one.facts] == [fact[0] for fact in other.facts]

    def fails(values: Any) -> bool:
        facts = describe(Grower(Choices(values=values)).tree()).facts
        return any("array" in str(fact) for _, fact in facts)

    for seed in range(20):
        choices = Choices(seed)
        Grower(choices).tree()
        if fails(choices.taken):
            small = shrink(choices.taken, fails, seconds=2)
            assert len(small) < len(choices.taken) / 2
            assert fails(small)
            return
    raise AssertionError("no tree has an array")
