"""What benchmarks print: the machine, and figures beside what they should be."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Check", "machine"]


@dataclass(frozen=True)
class Check:
    """A figure and the most that it should be."""

    what: str
    figure: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit

    def as_json(self) -> dict[str, Any]:
        """Return everything for a file."""
        return vars(self) | {"met": self.met}

    def as_row(self) -> str:
        """Return a row of a Markdown table."""
        bound = "at least" if self.at_least else "at most"
        return f"| {self.what} | {self.figure:.3g} | {bound} {self.limit:.3g} | {'met' if self.met else 'NOT MET'} |"


def machine() -> str:
    """Say what it runs on."""
    kernel = ".".join(platform.release().split(".")[:2])
    return (
        f"{platform.machine()}, {torch.get_num_threads()} cores, {platform.system()} {kernel}, "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    )
