"""Which place a probe blames for a hold, with times that the test makes up."""

from __future__ import annotations

import pytest

from aiostage.testing.probes import _Beat


def test_names_the_place_in_which_the_thread_computed_longest_and_not_the_last():
    beat = _Beat(0.0, 0.0)
    for stack, spent in (("in compute", 0.1), ("after it", 0.15), ("in compute", 0.1), ("after it", 0.01)):
        beat.blame(stack, spent)
    assert beat.stack == "in compute"
    assert beat.blamed == pytest.approx(0.36)
