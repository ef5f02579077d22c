"""Some random tests with fixed seeds and some with fresh ones; `make fuzz` runs many more."""

from __future__ import annotations

import random

import pytest

from tests.fuzz import changes, disturbing, staging

# PyTorch warns of quantized and compressed sparse tensors as such.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.holds_the_loop,
    pytest.mark.timeout(240),
]

FRESH = random.SystemRandom().randrange(10**6, 10**9)
"""Printed by what runs from it, so that a failure can be replayed."""


def test_trees_are_staged_as_deepcopy_copies_them() -> None:
    assert not staging.main(100, 0), "python -m tests.fuzz trees -n 100 --seed 0"


@pytest.mark.parametrize(("n", "seed"), [(40, 0), (10, FRESH)], ids=["fixed", "fresh"])
def test_results_are_right_whatever_changes_between_stagings(n: int, seed: int) -> None:
    assert not changes.main(n, seed), f"python -m tests.fuzz changes -n {n} --seed {seed}"


@pytest.mark.parametrize(("n", "seed"), [(80, 0), (20, FRESH)], ids=["fixed", "fresh"])
def test_a_disturbed_copy_is_of_one_moment_or_torn(n: int, seed: int) -> None:
    assert not disturbing.main(n, seed), f"python -m tests.fuzz disturbed -n {n} --seed {seed}"
