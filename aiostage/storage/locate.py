"""From what people write to a storage: paths, URLs, stores of obstore, and storages of their own."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, TypeAlias, cast
from urllib.parse import unquote, urlsplit

from aiostage._extras import needed_for
from aiostage.abc import Storage
from aiostage.storage.local import LocalStorage

__all__ = ["Root", "Target", "locate", "storage_at"]

Root: TypeAlias = "str | os.PathLike[str] | Storage | Any"
"""Where checkpoints lie: a path, a URL, a store of obstore, or a storage."""

Target: TypeAlias = "str | os.PathLike[str] | tuple[Root, str]"
"""Where one checkpoint lies: a path, a URL, or a root and a name below it."""

_OBJECT_SCHEMES = frozenset(("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "http", "https", "memory"))
"""What obstore opens; everything else is left to fsspec, as is what begins with ``fsspec+``."""


def locate(target: Target) -> tuple[Storage, str]:
    """Return the storage that a target is in, and its name there. Neither blocks nor looks whether it exists.

    Args:
        target: A path, a URL such as ``s3://bucket/runs/7``, or a pair of a root (see :func:`storage_at`) and a name.

    Raises:
        TypeError: If it is none of these.
        ValueError: If a URL has no path that could be a name.
        ModuleNotFoundError: If the package that opens such URLs is not installed.
    """
    if isinstance(target, tuple):
        root, name = target
        return storage_at(root), name
    if not isinstance(target, (str, os.PathLike)):
        raise TypeError(
            f"a checkpoint is at a path, at a URL, or at a pair of a storage and a name, not at {target!r}. "
            "Pass a path such as 'checkpoints/100', or (storage, name)."
        )
    text = os.fsdecode(target)
    if not _is_url(text):
        return _locate_path(text)
    if text.startswith("file://"):
        return _locate_path(_path_of(text))
    root, _, name = text.rstrip("/").rpartition("/")
    if root.endswith(":/") or not root or name.endswith(":"):
        scheme = text.partition("://")[0]
        raise ValueError(f"{text!r} names no checkpoint; the form of a URL is {scheme}://bucket/path/of/checkpoint")
    return storage_at(root), name


def storage_at(root: Root) -> Storage:
    """Return the storage below a root. Neither blocks nor looks whether it exists.

    Args:
        root: A path; a URL; a store of obstore; or a :class:`~aiostage.abc.Storage`, which is returned as it is.

    Raises:
        TypeError: If it is none of these.
        ModuleNotFoundError: If the package that opens such URLs is not installed.
    """
    if isinstance(root, Storage):
        return root
    if isinstance(root, (str, os.PathLike)):
        text = os.fsdecode(root)
        if text.startswith("file://"):
            return LocalStorage(_path_of(text))
        return _open_url(text) if _is_url(text) else LocalStorage(text)
    if type(root).__module__.partition(".")[0] in ("obstore", "_obstore"):
        return cast("Storage", _load("objects", "ObjectStorage", repr(root))(root))
    raise TypeError(f"checkpoints lie below a path, a URL, a store of obstore or a Storage, not below {root!r}")


def _locate_path(path: str) -> tuple[Storage, str]:
    root, name = os.path.split(path.rstrip("/") or "/")
    if name in ("", ".", ".."):
        # The directory itself, whatever it is called.
        return LocalStorage(path), "."
    return LocalStorage(root), name


def _is_url(text: str) -> bool:
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.replace("+", "").replace("-", "").isalnum()


def _path_of(url: str) -> str:
    return unquote(urlsplit(url).path)


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
