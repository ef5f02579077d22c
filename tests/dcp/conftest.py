"""Worlds of ranks, started once for all tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dcp.world import World


@pytest.fixture(scope="package")
def pair() -> Iterator[World]:
    """Two ranks that live through all tests. A test that harms one makes a world of its own."""
    with World(2) as world:
        yield world
