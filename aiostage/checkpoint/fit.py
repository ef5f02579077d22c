"""How well a checkpoint has to fit a live tree."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from aiostage.errors import SHOWN_PATHS, listed

__all__ = ["STRICT", "Fit", "StrictOption", "is_rounded"]

_logger = logging.getLogger("aiostage")

_NOT_ROUNDED = frozenset({torch.float4_e2m1fn_x2, torch.float8_e8m0fnu})
"""Two numbers to an element, and scales, which are powers of two."""

StrictOption: TypeAlias = bool | Callable[[list[str], list[str]], object]
"""Whether the same leaves are needed; or what is called with the paths of those missing and of those unexpected."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a checkpoint has to fit a live tree.

    Attributes:
        strict: Whether it needs the same leaves.
        cast: Whether floating-point tensors take values of another floating-point dtype.
        name: Of the checkpoint, for warnings.
    """

    strict: StrictOption = True
    cast: bool = False
    name: str = ""

    def report(self, missing: list[str], unexpected: list[str]) -> None:
        """Tell of leaves that only one of the two has, when that is no error."""
        if callable(self.strict):
            self.strict(missing, unexpected)
            return
        for paths, what in ((missing, "missing from"), (unexpected, "unexpected in")):
            if paths:
                _logger.warning(
                    "%d leaves are %s %s and were left out: %s",
                    len(paths),
                    what,
                    self.name,
                    listed(paths[:SHOWN_PATHS]),
                )


STRICT = Fit()
"""The same leaves, of the same dtypes."""


def is_rounded(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has floating-point numbers that torch can round to others."""
    return tensor.dtype.is_floating_point and tensor.dtype not in _NOT_ROUNDED
