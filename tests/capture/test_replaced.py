"""Memory that another coroutine replaces during a staging: found at capture, by path."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from aiostage import AsyncStager, StagingOptions, TornSnapshotError
from tests.staging.holding import copies_held


def _replace(tensor: torch.Tensor) -> None:
    tensor.data = torch.zeros(8)


def _swap(tensor: torch.Tensor) -> None:
    torch.utils.swap_tensors(tensor, torch.zeros(8))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "change",
    [
        _replace,
        _swap,
        lambda tensor: tensor.set_(torch.zeros(8)),
        lambda tensor: tensor.untyped_storage().resize_(0),
        lambda tensor: tensor.untyped_storage().resize_(64),
    ],
    ids=["data", "swap_tensors", "set_", "freed", "grown"],
)
async def test_is_torn_and_names_the_leaf(change: Callable[[torch.Tensor], object]) -> None:
    tree = {"a": torch.ones(8), "b": torch.ones(3)}
    async with AsyncStager() as stager:
        for _ in range(3):
            await stager.stage(tree)
        with copies_held(stager) as release:
            async with stager.snapshot(tree) as snapshot:
                change(tree["a"])
                release.set()
                with pytest.raises(TornSnapshotError) as caught:
                    await snapshot.captured()
    assert caught.value.paths == ("state_dict['a']",)


CONVERTED = {
    "cast": (lambda value: torch.full((999,), value), StagingOptions(max_loop_hold=1e-9, dtype=torch.float64)),
    "conjugate": (
        lambda value: torch.full((999,), complex(value, 1.0)).conj(),
        StagingOptions(max_loop_hold=1e-9),
    ),
    "cast, in pieces": (
        lambda value: torch.full((2, 999), value)[:, ::2],
        StagingOptions(max_loop_hold=1e-9, dtype=torch.float64),
    ),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", CONVERTED)
@pytest.mark.parametrize("detect_torn", [True, False])
async def test_a_leaf_that_is_converted_is_read_where_it_was_noted_whenever_it_is_replaced(
    kind: str, detect_torn: bool
) -> None:
    make, options = CONVERTED[kind]
    ended: Counter[str] = Counter()
    async with AsyncStager(replace(options, detect_torn=detect_torn)) as stager:
        for turn in range(24):
            # Enough before it for some turns between its noting and its copy.
            tree = {"before": [torch.ones(1) for _ in range(600)], "leaf": make(2.0)}
            expected = tree["leaf"].clone().to(torch.float64 if options.dtype else torch.complex64)
            task = asyncio.ensure_future(stager.stage(tree))
            for _ in range(turn):
                await asyncio.sleep(0)
            was_done = task.done()
            tree["leaf"].data = torch.full((7,), 3.0, dtype=tree["leaf"].dtype)
            try:
                staged = (await task)["leaf"]
            except TornSnapshotError:
                ended["torn"] += 1
            else:
                if staged.shape == (7,):
                    ended["after"] += 1
                    assert staged.tolist() == [3.0] * 7
                else:
                    ended["before"] += 1
                    assert was_done or not detect_torn
                    assert torch.equal(staged, expected)
    assert ended["torn"], "it was never replaced between its noting and its copy"
