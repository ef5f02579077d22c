"""Some random tests with fixed seeds and some with fresh ones; `make fuzz` runs many more."""

from __future__ import annotations

import random

import pytest

from tests.fuzz import cancelling, changes, disturbing, staging

# PyTorch warns of quantized and compressed sparse tensors as such.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.holds_the_loop,
    pytest.mark.timeout(240),
]

FRESH = random.SystemRandom().randrange(10**6, 10**9)
"""Printed by what runs from it, so that a failure can be replayed."""


RUNS = {
    "trees": (staging.main, 140, 40),
    "changes": (changes.main, 24, 8),
    "disturbed": (disturbing.main, 80, 30),
    "cancelled": (cancelling.main, 24, 8),
}
"""What is run, and how often from fixed and from fresh seeds."""


@pytest.mark.parametrize("seeds", ["fixed", "fresh"])
@pytest.mark.parametrize("kind", RUNS)
def test_none_is_wrong(kind: str, seeds: str) -> None:
    main, fixed, fresh = RUNS[kind]
    n, seed = (fixed, 0) if seeds == "fixed" else (fresh, FRESH)
    assert not main(n, seed), f"again: python -m tests.fuzz {kind} -n {n} --seed {seed}"
