"""Memory that another coroutine replaces during a staging: found at capture, by path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from aiostage import AsyncStager, TornSnapshotError
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
