"""What a checkpoint of :mod:`aiostage.dcp` consists of: records in files, metadata that says where, and a manifest."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import Metadata

from aiostage.abc import Buffer, Reader
from aiostage.dcp.unpickling import read_metadata
from aiostage.errors import CheckpointCorruptError, said
from aiostage.format.parts import digest
from aiostage.storage.commit import MANIFEST_NAME

__all__ = ["FORMAT", "METADATA_NAME", "VERSION", "Record", "memory_of", "read_index", "read_record", "tensor_of"]

METADATA_NAME = ".metadata"
"""DCP's own name for it."""

FORMAT = "aiostage-dcp"
VERSION = 1

_MAX_MANIFEST_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Record:
    """Where the bytes of one item are.

    Attributes:
        file: Its name.
        offset: The offset of the first byte in the file.
        nbytes: How many there are.
        digest: The digest of the bytes.
        dtype: The dtype of the elements, or None for what DCP has pickled.
        shape: The shape of the shard.
    """

    file: str
    offset: int
    nbytes: int
    digest: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]


Record.__module__ = "aiostage.dcp.storage"
# Metadata is pickled with the name of this class in it, and checkpoints outlive the files of this package.


async def read_index(reader: Reader) -> Metadata:
    """Read what a checkpoint has, and where: ``storage_data`` has a :class:`Record` for each item.

    Args:
        reader: The reader of the checkpoint.

    Raises:
        CheckpointCorruptError: If it is damaged, or not one of DCP's.
        OSError: If the storage refuses.
    """
    nbytes, expected = _read_manifest(await reader.manifest(), reader.location)
    path = f"{reader.location}/{METADATA_NAME}"
    found = await reader.size(METADATA_NAME)
    if found != nbytes:
        raise CheckpointCorruptError(f"expected {nbytes} bytes, got {found}.", path=path)
    data = await read_record(reader, Record(METADATA_NAME, 0, nbytes, expected, None, ()))
    try:
        metadata = read_metadata(data, Record)
    except Exception as error:
        raise CheckpointCorruptError(f"it cannot be unpickled: {said(error)}.", path=path) from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointCorruptError(f"it is not metadata of DCP but a {type(metadata).__name__}.", path=path)
    return metadata


async def read_record(reader: Reader, record: Record) -> Buffer:
    """Read the bytes of one item, and compare them with their digest.

    Raises:
        CheckpointCorruptError: If they are not those that were written.
        OSError: If the storage refuses.
    """
    # Read whole, because its digest is that of all of it; a reader of a part of a shard pays for the shard.
    data = memory_of(torch.empty(record.nbytes, dtype=torch.uint8, device="cpu"))
    if record.nbytes:
        await reader.read(record.file, record.offset, data)
    if digest(data) != record.digest:
        raise CheckpointCorruptError(
            f"bytes {record.offset} to {record.offset + record.nbytes} are not those that were written.",
            path=f"{reader.location}/{record.file}",
            remedy="Load an older checkpoint.",
        )
    return data


def tensor_of(record: Record, data: Buffer) -> torch.Tensor:
    """Return the shard that an item is, over its bytes."""
    dtype = record.dtype or torch.uint8
    tensor = torch.frombuffer(data, dtype=dtype) if record.nbytes else torch.empty(0, dtype=dtype, device="cpu")
    return tensor.view(record.shape)


def _read_manifest(text: Buffer, location: str) -> tuple[int, str]:
    """Return how long the metadata is, and its digest, from a manifest that may be damaged or hostile."""
    try:
        if len(text) > _MAX_MANIFEST_BYTES:
            raise ValueError(f"it is {len(text)} bytes long")
        manifest = json.loads(bytes(text))
        version = manifest["version"]
        if manifest["format"] != FORMAT or type(version) is not int or version != VERSION:
            raise CheckpointCorruptError(
                "it is not a checkpoint of aiostage.dcp, or of a newer one.",
                path=location,
                remedy="Read it with aiostage.load, or with a newer aiostage.",
            )
        about = manifest["metadata"]
        nbytes, expected = about["nbytes"], about["xxh3_64"]
        if about["name"] != METADATA_NAME or type(nbytes) is not int or nbytes < 0 or type(expected) is not str:
            raise ValueError("it does not say where the metadata is")
    except CheckpointCorruptError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # Checkpoints of other kinds have longer ones, of other forms.
        raise CheckpointCorruptError(
            f"it is not a manifest of aiostage.dcp: {said(error)}.",
            path=f"{location}/{MANIFEST_NAME}",
            remedy="Read checkpoints of aiostage.save with aiostage.load.",
        ) from error
    return nbytes, expected


def memory_of(tensor: torch.Tensor) -> Buffer:
    """Return the memory of a contiguous tensor."""
    data: Buffer = tensor.view(-1).view(torch.uint8).numpy().data
    return data
