"""The errors of aiostage: one tree, each with what was wrong, where, and the way out.

Every class also inherits the standard-library exception it is one of, so that code which already catches
``MemoryError`` or ``FileNotFoundError`` keeps working. All survive pickling, so they may cross a process boundary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any

__all__ = [
    "AcceleratorUnavailableError",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "HostMemoryError",
    "RankFailedError",
    "StagerClosedError",
    "StagingError",
    "StorageError",
    "TornSnapshotError",
    "UnsupportedLeafError",
    "WeightsError",
]

_LONGEST_VALUE = 80
_LONGEST_REASON = 1000
_LONGEST_PATH = 200
_FEW = 4
_SMALL = (bool, int, float, complex)
_CONTAINERS: tuple[Any, ...] = (dict, list, tuple, set, frozenset, bytearray, deque)
_SMALL_OF_TORCH = ("dtype", "device", "layout", "memory_format")

SHOWN_PATHS = 10
"""How many paths a message spells out before it counts the rest."""


class StagingError(Exception):
    """The base of every error that aiostage raises.

    Args:
        reason: What was wrong, with the value that was given.
        path: Where in the state dict, as rendered by :func:`aiostage.leaf.format_path`, or a file name; None if
            the error is not about one place.
        remedy: What the caller can do about it.
    """

    def __init__(self, reason: str, *, path: str | None = None, remedy: str | None = None) -> None:
        self.reason = reason
        self.path = path
        self.remedy = remedy
        # Not the next in the method order: that may be another library's constructor, which takes other arguments.
        _layout(type(self)).__init__(self, reason)

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path is not None else ""
        remedy = f" {self.remedy}" if self.remedy is not None else ""
        return f"{where}{self.reason}{remedy}"

    def __repr__(self) -> str:
        # As in groups, notes and logs: without the path the reader does not know which one it was.
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ replays only positional arguments and would lose the keyword ones.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _layout(cls: type[StagingError]) -> Any:
    # The built-in class that lays out the instance. The constructors that come first in the method order may be those
    # of others: Python refuses to use such a __new__, and such an __init__ expects other arguments.
    layout: Any = cls
    while layout.__module__ != "builtins":
        layout = layout.__base__
    return layout


def _rebuild(cls: type[StagingError], args: tuple[object, ...], state: dict[str, object]) -> StagingError:
    error: StagingError = _layout(cls).__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class StagerClosedError(StagingError, RuntimeError):
    """The stager was closed before or while the call was under way."""

    def __init__(self, reason: str = "the stager is closed") -> None:
        super().__init__(f"{reason}.", remedy="Make a new AsyncStager; a closed one cannot be reopened.")


class TornSnapshotError(StagingError, RuntimeError):
    """The source changed while it was being captured, so the copy would mix old and new values.

    Attributes:
        paths: Every place that changed, rendered.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths: tuple[str, ...] = tuple(paths)
        super().__init__(
            f"the source changed while it was being captured, at {listed(self.paths)}.",
            remedy=(
                "Wait for the staging to be captured before changing the source, or set max_loop_hold=math.inf "
                "to capture containers in one indivisible step."
            ),
        )


class UnsupportedLeafError(StagingError, TypeError):
    """A leaf cannot be staged or saved faithfully; nothing was copied or written."""


class HostMemoryError(StagingError, MemoryError):
    """Host memory for the staged copy cannot be had, within the budget or at all."""


class AcceleratorUnavailableError(StagingError, RuntimeError):
    """An option asks for an accelerator, or for something of one, that is not there."""


class CheckpointError(StagingError):
    """A checkpoint could not be written or read."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was to be read."""


class CheckpointCorruptError(CheckpointError, ValueError):
    """The files of a checkpoint contradict each other, their checksums or the format.

    The message has at most 1,000 characters of what the files say: their author may have put anything in.
    """

    def __init__(self, reason: str, *, path: str | None = None, remedy: str | None = None) -> None:
        super().__init__(_cut(reason, _LONGEST_REASON), path=path, remedy=remedy)


class CheckpointExistsError(CheckpointError, FileExistsError):
    """There is already something where a checkpoint was to be written."""


class StorageError(CheckpointError, OSError):
    """A storage refused, or could not be reached, after all configured retries."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """A checkpoint, or a staged copy, and the live tree do not have the same leaves; nothing was changed.

    Attributes:
        missing: Rendered paths that the live tree has and the checkpoint lacks.
        unexpected: Rendered paths that the checkpoint has and the live tree lacks.
        mismatched: Rendered paths that both have, each followed by how they differ.
    """

    def __init__(
        self,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Iterable[str] = (),
        source: str = "the checkpoint",
        remedy: str = "Load without into= to get the checkpoint as its own tree.",
    ) -> None:
        self.missing: tuple[str, ...] = tuple(missing)
        self.unexpected: tuple[str, ...] = tuple(unexpected)
        self.mismatched: tuple[str, ...] = tuple(mismatched)
        parts = [
            f"{name}: {listed([_cut(path, _LONGEST_PATH) for path in paths[:SHOWN_PATHS]] + list(paths[SHOWN_PATHS:]))}"
            for name, paths in (
                (f"missing from {source}", self.missing),
                (f"unexpected in {source}", self.unexpected),
                ("mismatched", self.mismatched),
            )
            if paths
        ]
        super().__init__(f"{source} does not fit the live state dict; {'; '.join(parts)}.", remedy=remedy)


class RankFailedError(CheckpointError, RuntimeError):
    """A save or load of many ranks failed because of some of them. Every rank that is still there raises it.

    Args:
        failures: What was wrong with each of them, by global rank.
        lost: Whether the ranks may have lost each other, so that their process group was closed.

    Attributes:
        failures: What was wrong with each of them, by global rank.
        lost: Whether the ranks may have lost each other, so that their process group was closed.
    """

    def __init__(self, failures: Mapping[int, str], *, lost: bool = False) -> None:
        self.failures: dict[int, str] = dict(failures)
        self.lost = lost
        reasons = [f"rank {rank} failed: {reason.rstrip('.')}" for rank, reason in sorted(self.failures.items())]
        remedy = (
            "The process group that aiostage made for checkpoints is closed; the next call makes another one, which "
            "needs every rank to be there."
            if lost
            else "The process group is as it was, and the next call may follow."
        )
        super().__init__(f"{listed(reasons)}.", remedy=remedy)


class WeightsError(StagingError, ConnectionError):
    """Weights could not be published, or a publisher and a subscriber do not go together."""


def listed(paths: Sequence[str]) -> str:
    """Join paths for a message, spelling out the first few and counting the rest."""
    spelled = ", ".join(paths[:SHOWN_PATHS])
    rest = len(paths) - SHOWN_PATHS
    return f"{spelled} and {rest} more" if rest > 0 else spelled


def shown(value: object, *, _depth: int = 0) -> str:
    """Describe a value for a message: what it is if that is short, its type and size if it is not.

    Only what is small by nature is asked for its repr, for a state dict's takes seconds and megabytes.

    Args:
        value: Anything, such as an argument of the wrong type.

    Returns:
        At most 80 characters of the value, and the name of its type where it is a container, a tensor or an object.
    """
    kind = type(value)
    if isinstance(value, int) and value.bit_length() > 4 * _LONGEST_VALUE:
        # It may have more digits than Python agrees to write.
        return f"a number of {value.bit_length()} bits"
    if value is None or kind in _SMALL or (kind.__module__ == "torch" and kind.__name__ in _SMALL_OF_TORCH):
        return repr(value)
    if isinstance(value, (str, bytes)):
        plain: str | bytes = str.__str__(value) if isinstance(value, str) else bytes(value[:_LONGEST_VALUE])
        return _cut(repr(plain[:_LONGEST_VALUE]) + "..." * (len(value) > _LONGEST_VALUE), _LONGEST_VALUE)
    if isinstance(value, PurePath):
        return _cut(f"{kind.__name__}({str(value)!r})", _LONGEST_VALUE)
    if isinstance(value, Enum):
        return _cut(f"{kind.__qualname__}.{value.name}", _LONGEST_VALUE)
    if isinstance(value, type):
        return _cut(f"the class {value.__qualname__}", _LONGEST_VALUE)
    if kind is tuple and isinstance(value, tuple) and len(value) <= _FEW and _depth < _FEW:
        parts = ", ".join([shown(item, _depth=_depth + 1) for item in value])
        return _cut(f"({parts}{',' * (len(value) == 1)})", _LONGEST_VALUE)
    return _cut(kind.__qualname__, _LONGEST_VALUE // 2) + _size_of(value)


def _size_of(value: object) -> str:
    """Return how large a container or a tensor is, by calls that return at once and run no code of the user."""
    kind = type(value)
    for base in _CONTAINERS:
        if isinstance(value, base):
            return f" of {base.__len__(value)}"
    if kind.__module__.partition(".")[0] in ("torch", "numpy"):
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple):
            return f" of shape {_cut(str(tuple(shape)), _LONGEST_VALUE // 2 - len(' of shape '))}"
    return ""


def said(error: BaseException) -> str:
    """Return the class of an error and what it says, in at most 300 characters and without a full stop at the end."""
    if len(error.args) > 1:
        return _cut(repr(error), 300)
    return f"{type(error).__name__}: {_cut(str(error).rstrip('.'), 300)}"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
