"""How far a save or a load has come, told to a function or shown as a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TypeAlias, TypeVar

from aiostage._arguments import FLAG, check_progress

__all__ = ["LoadProgress", "Progress", "ProgressOption", "SaveProgress", "reporting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far something has come that moves bytes.

    Attributes:
        name: The name of the checkpoint.
        total_bytes: How many bytes there will be in the end; what is small, the manifest for one, is not counted.
    """

    name: str
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveProgress(Progress):
    """How far a save has come.

    Attributes:
        staged_bytes: How many bytes have been copied to host memory, at least.
        written_bytes: How many bytes the storage has taken.
    """

    staged_bytes: int
    written_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress(Progress):
    """How far a load has come.

    Attributes:
        read_bytes: How many bytes have been read, and verified if they are.
    """

    read_bytes: int


P = TypeVar("P", bound=Progress)

ProgressOption: TypeAlias = bool | Callable[[P], object] | None
"""True shows a bar, a function is called on the event loop; what it raises ends the save or load."""


@contextmanager
def reporting(progress: ProgressOption[P], title: str) -> Iterator[Callable[[P], object] | None]:
    """Make a function to report to out of what the user has asked for.

    Args:
        progress: What the user has asked for.
        title: What a bar is called.

    Raises:
        TypeError: If it is neither a bool nor a function.
        ImportError: If a bar is asked for and tqdm is not installed.
    """
    check_progress(progress)
    if isinstance(progress, FLAG) and progress:
        # By name, because integrations import this package, and are imported only when they are used.
        bar = import_module("aiostage.integrations.tqdm").ProgressBar(title)
        try:
            yield bar.show
        finally:
            bar.close()
    else:
        # A function may be an object that counts as false, such as a list that is called with what is appended to it.
        yield progress if callable(progress) else None
