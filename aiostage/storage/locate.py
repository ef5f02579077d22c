"""Where checkpoints are: paths, URLs, stores of obstore, storages of users; and the names of a run's checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, TypeAlias, cast
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from aiostage._extras import needed_for
from aiostage.abc import Storage
from aiostage.errors import CheckpointNotFoundError, shown
from aiostage.storage.local import LocalStorage

__all__ = [
    "Root",
    "Target",
    "exists",
    "locate",
    "lock_of",
    "locked_by",
    "name_of",
    "present",
    "removed_by_tombstone",
    "sort_out",
    "step_of",
    "storage_at",
    "surplus",
    "tombstone_of",
]

Root: TypeAlias = str | os.PathLike[str] | Storage | Any
"""Where checkpoints lie: a path, a URL, a store of obstore, or a storage."""

Target: TypeAlias = str | os.PathLike[str] | tuple[Root, str]
"""Where one checkpoint lies: a path, a URL, or a root and a name below it."""

_OBJECT_SCHEMES = frozenset(("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "http", "https", "memory"))
"""Schemes that obstore opens. fsspec opens all others, and URLs that begin with ``fsspec+``."""

_FLATTENED = re.compile(rf"((?:fsspec\+\w+|file|hf|gcs|{'|'.join(sorted(_OBJECT_SCHEMES))})):/")
"""The beginning of a URL after it was a ``pathlib.Path``."""

# The names of a run's checkpoints are part of the layout of a storage: processes of other versions look for them.
_NAME = re.compile(r"step-(\d{8,})")
_TOMBSTONE = ".removed"
_LOCK = ".pinned"


def locate(target: Target) -> tuple[Storage, str]:
    """Return the storage that a target is in, and its name there. Neither blocks nor looks whether it exists.

    Args:
        target: A path, a URL such as ``s3://bucket/runs/7``, or a pair of a root (see :func:`storage_at`) and a name.

    Raises:
        TypeError: If it is none of these.
        ValueError: If a URL has no path that could be a name, or a path can be none.
        ModuleNotFoundError: If the package that opens such URLs is not installed.
    """
    match target:
        case tuple((root, str(name))):
            return storage_at(root), name
        case str() | os.PathLike():
            text = os.fsdecode(target)
        case _:
            raise TypeError(
                f"a checkpoint is at a path, at a URL, or at a pair of a storage and a name, not at {shown(target)}. "
                "Pass a path such as 'checkpoints/100', or (storage, name)."
            )
    if not _is_url(text):
        return _locate_path(_checked(text))
    if text.startswith("file://"):
        return _locate_path(_path_of(text))
    root, _, name = text.rstrip("/").rpartition("/")
    if root.endswith(":/") or not root or name.endswith(":"):
        scheme = text.partition("://")[0]
        raise ValueError(
            f"{shown(text)} names no checkpoint; the form of a URL is {scheme}://bucket/path/of/checkpoint"
        )
    return storage_at(root), name


def storage_at(root: Root) -> Storage:
    """Return the storage below a root. Neither blocks nor looks whether it exists.

    Args:
        root: A path; a URL; a store of obstore; or a :class:`~aiostage.abc.Storage`, which is returned as it is.

    Raises:
        TypeError: If it is none of these.
        ValueError: If a path can be none.
        ModuleNotFoundError: If the package that opens such URLs is not installed.
    """
    if isinstance(root, Storage):
        return root
    if isinstance(root, (str, os.PathLike)):
        text = os.fsdecode(root)
        if text.startswith("file://"):
            return LocalStorage(_path_of(text))
        return _open_url(text) if _is_url(text) else LocalStorage(_checked(text))
    if type(root).__module__.partition(".")[0] in ("obstore", "_obstore"):
        return cast("Storage", _load("objects", "ObjectStorage", repr(root))(root))
    raise TypeError(f"checkpoints lie below a path, a URL, a store of obstore or a Storage, not below {shown(root)}")


def _locate_path(path: str) -> tuple[Storage, str]:
    root, name = os.path.split(path.rstrip("/") or "/")
    if name in ("", ".", ".."):
        # The last step is not a name, but the path is a directory: that is the checkpoint.
        return LocalStorage(path), "."
    return LocalStorage(root), name


def _checked(path: str) -> str:
    """Refuse what is not a path, or is one only by mistake; return it with the home of a user in place of ``~``."""
    if not path:
        raise ValueError("the path of a checkpoint is empty. Pass '.' for the working directory.")
    if "\0" in path:
        raise ValueError(f"{shown(path)} is not a path: it has a null byte")
    scheme = _FLATTENED.match(path)
    if scheme is not None:
        raise ValueError(
            f"{shown(path)} looks like a URL that has been a pathlib.Path, which makes one slash of two. "
            f"Pass URLs as text: '{scheme[1]}://...'. For a directory of that name write './{scheme[1]}:/...'."
        )
    return os.path.expanduser(path)


def _is_url(text: str) -> bool:
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.replace("+", "").replace("-", "").isalnum()


def _path_of(url: str) -> str:
    # These begin a query and a fragment, which a path does not have: it would lose its end, and be another path.
    if "?" in url or "#" in url:
        raise ValueError(
            f"{shown(url)} is not the URL of a path: it has a '?' or a '#'. Write %3F and %23 for them, or pass the "
            "path itself."
        )
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(
            f"{shown(url)} names the host {shown(parts.netloc)}; only files of this one can be opened. "
            f"A path from the root has three slashes: 'file:///{parts.netloc}{parts.path}'"
        )
    return _checked(unquote(parts.path))


def _open_url(url: str) -> Storage:
    if url.partition("://")[0].lower() in _OBJECT_SCHEMES:
        opener = _load("objects", "ObjectStorage", url)
    else:
        opener = _load("remote_files", "FsspecStorage", url)
    return cast("Storage", opener.from_url(url))


def _load(module: str, name: str, target: str) -> Any:
    """Import what needs an extra."""
    with needed_for(target):
        return getattr(import_module(f"aiostage.storage.{module}"), name)


async def exists(storage: Storage, name: str) -> bool:
    """Return whether there is a checkpoint, or a tombstone, of a name.

    Raises:
        OSError: If the storage refuses.
    """
    try:
        await (await storage.read(name)).aclose()
    except CheckpointNotFoundError:
        return False
    return True


# What the checkpoints of a run are called, and what lies beside them


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint; names sort as their steps do up to 99,999,999."""
    return f"step-{step:08}"


def tombstone_of(name: str) -> str:
    """Return the name of the tombstone of a checkpoint: it was removed, and others still need parts of it."""
    return name + _TOMBSTONE


def removed_by_tombstone(name: str) -> str | None:
    """Return the checkpoint that a tombstone is for, or None if the name is not that of a tombstone."""
    removed = name.removesuffix(_TOMBSTONE)
    return removed if removed != name and step_of(removed) is not None else None


def lock_of(name: str) -> str:
    """Return a new name for a reference lock of a checkpoint.

    It is a pending checkpoint, which a save holds while it writes another checkpoint that refers to this one. So it
    goes with its writer, as every pending checkpoint does.
    """
    # Unique, so that a writer tells its own lock from another writer's: only that one says that it was never lost.
    return f"{name}.{uuid4().hex}{_LOCK}"


def locked_by(pending: Iterable[str]) -> set[str]:
    """Return the checkpoints with a reference lock.

    Args:
        pending: The names of all pending checkpoints of a storage.
    """
    return {name.removesuffix(_LOCK).rpartition(".")[0] for name in pending if name.endswith(_LOCK)}


def present(names: Iterable[str]) -> set[str]:
    """Return the checkpoints of a run that were not removed.

    Args:
        names: All that a storage lists of the run.
    """
    names = set(names)
    return {name for name in names if step_of(name) is not None and tombstone_of(name) not in names}


def sort_out(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Separate the checkpoints that are there from those that were removed and of which others still need parts.

    Args:
        names: What a storage lists, of one run or of several below it.

    Returns:
        The names of both, in order. Tombstones are neither.
    """
    names = set(names)
    tombstones = {name for name in names if removed_by_tombstone(name.rpartition("/")[2]) is not None}
    removed = {name for name in names if tombstone_of(name) in tombstones}
    return sorted(names - removed - tombstones), sorted(removed)


def step_of(name: str) -> int | None:
    """Return the step that a checkpoint is of, or None if it is not one of a run's."""
    match = _NAME.fullmatch(name)
    # Only the name that name_of() gives. With more leading zeros, two names would be one step.
    return int(match[1]) if match and name == name_of(int(match[1])) else None


def surplus(
    steps: Iterable[int], *, keep: int | None, keep_also: Callable[[int], bool] | None, newest: int | None
) -> list[int]:
    """Return the steps whose checkpoints are to be removed, oldest first.

    Args:
        steps: All that there are, in any order.
        keep: How many of the last to keep; None keeps all.
        keep_also: Returns whether to keep a step independent of its age.
        newest: The one that was saved last. It stays also if there are later steps, as after going back to an earlier
            one.
    """
    if keep is None:
        return []
    older = sorted(steps)[:-keep]
    return [step for step in older if step != newest and not (keep_also is not None and keep_also(step))]
