"""Every kind of parallelism, from any number of ranks to any other, against the unsharded state to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.dcp import models
from tests.dcp.world import World


@pytest.fixture(scope="module")
def worlds(pair: World) -> Iterator[Callable[[int], World]]:
    """Worlds by size, started when they are asked for."""
    with ExitStack() as stack:
        started = {2: pair}

        def world(size: int) -> World:
            if size not in started:
                started[size] = stack.enter_context(World(size))
            return started[size]

        yield world


def check(worlds: Callable[[int], World], kind: str, path: Path, before: int, after: int) -> None:
    worlds(before).run(models.saved, kind, str(path))
    (found, *_) = worlds(after).run(models.differences, kind, str(path))
    assert not found


@pytest.mark.parametrize("kind", models.KINDS[1:])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
class TestTwo:
    def test_to_the_bit(
        self, worlds: Callable[[int], World], tmp_path: Path, kind: str, before: int, after: int
    ) -> None:
        check(worlds, kind, tmp_path / "a", before, after)


def test_another_kind_loads_it_and_plain_dcp(pair: World, tmp_path: Path) -> None:
    pair.run(models.saved, "fsdp", str(tmp_path / "a"))
    for kind in ("ddp", "tensor-parallel"):
        assert not pair.run(models.differences, kind, str(tmp_path / "a"))[0]
    assert not pair.run(models.differences, "hsdp", str(tmp_path / "a"), True)[0]


@pytest.mark.distributed_slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", models.KINDS[1:])
@pytest.mark.parametrize(("before", "after"), [(4, 4), (4, 2), (4, 1), (2, 4), (1, 4)])
class TestFour:
    def test_to_the_bit(
        self, worlds: Callable[[int], World], tmp_path: Path, kind: str, before: int, after: int
    ) -> None:
        check(worlds, kind, tmp_path / "a", before, after)
