"""Weights that tell by themselves which version they are of, and whether they are of one version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import torch

from tests.patience import seconds

PIECES = 6
ELEMENTS = 4000


def weights(version: int) -> dict[str, Any]:
    """Return weights of one version: every element is its number."""
    return {f"layer{number}": torch.full((ELEMENTS,), float(version)) for number in range(PIECES)}


def versions_in(state_dict: dict[str, Any]) -> set[float]:
    """Return the lowest and the highest version that elements are of: one, or the tree is a mixture."""
    return {float(extreme) for tensor in state_dict.values() for extreme in torch.aminmax(tensor)}


async def until(true: Callable[[], object]) -> None:
    """Wait until something is true."""
    with anyio.fail_after(seconds(20)):
        while not true():
            await anyio.sleep(0.001)
