"""A stager that copies nothing, for trees that are to be written from where they are."""

from __future__ import annotations

from typing import Any

from aiostage import CheckpointStager

__all__ = ["Uncopied"]


class Uncopied(CheckpointStager):
    """Stages a tree by returning it. The tree must not change until the save is over."""

    async def stage(self, state_dict: Any) -> Any:
        """Return the tree itself."""
        return state_dict

    async def aclose(self) -> None:
        """There is nothing to close."""
