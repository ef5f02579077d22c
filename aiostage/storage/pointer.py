"""The pointer that makes a folder of objects a checkpoint, and the folder that it names."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from aiostage.abc import Buffer
from aiostage.errors import CheckpointCorruptError, said
from aiostage.storage.bucket import Bucket, Version
from aiostage.storage.lease import LEASE_NAME

__all__ = ["FOLDER", "POINTER_NAME", "Pointer", "end_uploads", "find_pointer", "remove_folder", "write_pointer"]

POINTER_NAME = "checkpoint.json"
"""What every checkpoint has, and what tells one from other objects."""

FOLDER = re.compile(r"data-[0-9a-f]{16}")
"""The name of a folder with the files of one draft."""

_FORMAT = "aiostage"
_VERSION = 1
_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Pointer:
    """What a checkpoint's pointer says.

    Attributes:
        folder: Name of the folder with its files.
        version: Which state of the pointer that is.
    """

    folder: str
    version: Version


async def find_pointer(bucket: Bucket, name: str) -> Pointer | None:
    """Return the pointer of a checkpoint, or None if there is no such checkpoint.

    Raises:
        CheckpointCorruptError: If it is something else.
        StorageError: If the store refuses.
    """
    path = f"{name}/{POINTER_NAME}"
    try:
        found = await bucket.get(path, at_most=_MAX_BYTES)
    except FileNotFoundError:
        return None
    try:
        content = json.loads(bytes(found.data))
        version = content["version"]
        if content["format"] != _FORMAT or type(version) is not int or version != _VERSION:
            raise ValueError("it is of another format or version")
        if not FOLDER.fullmatch(content["data"]):
            raise ValueError("it names no folder of a checkpoint")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointCorruptError(
            f"it is not the pointer of a checkpoint: {said(error)}.", path=f"{bucket.location}/{path}"
        ) from error
    return Pointer(content["data"], found.version)


def write_pointer(folder: str) -> Buffer:
    """Compose the pointer to a folder."""
    return memoryview(json.dumps({"format": _FORMAT, "version": _VERSION, "data": folder}).encode())


async def end_uploads(bucket: Bucket, folder: str) -> None:
    """End the uploads to a folder without a writer."""
    uploads = [upload async for batch in bucket.uploads(f"{folder}/") for upload in batch]
    for upload in uploads:
        await bucket.end(upload)


async def remove_folder(bucket: Bucket, folder: str) -> None:
    """Remove all objects below a path, the lease last: its age tells when the writer of the rest was last alive.

    A link itself is removed; its target stays.
    """
    if await bucket.is_link(folder):
        await bucket.unlink(folder)
        return
    paths = [entry.path async for batch in bucket.list(folder) for entry in batch]
    lease = f"{folder}/{LEASE_NAME}"
    await bucket.delete([path for path in paths if path != lease])
    if lease in paths:
        await bucket.delete([lease])
