"""The error of a save or load of many ranks: one class for those who catch ours, and for those who catch DCP's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from aiostage.errors import RankFailedError

__all__ = ["RanksFailedError"]


class RanksFailedError(RankFailedError, CheckpointException):
    """The error of a save or load in which ranks have failed: catch ``RankFailedError`` or ``CheckpointException``.

    The type is private; catch one of the two.

    Attributes:
        failures: What was wrong with each rank, as text, by global rank. PyTorch's error has pairs of an exception and
            its stack instead. A rank that was killed cannot send these.
    """

    failures: dict[int, str] = {}  # type: ignore[assignment]  # noqa: RUF012 - in place of a property

    def __init__(self, failures: Mapping[int, str], *, lost: bool = False) -> None:
        super().__init__(failures, lost=lost)
        # Read by CheckpointException's own methods.
        self._failures: dict[int, Any] = {rank: (RuntimeError(text), None) for rank, text in self.failures.items()}
