"""The format of :mod:`aiostage.dcp`: records in files, DCP's metadata that says where they are, and a manifest.

The manifest has the size and the digest of the metadata, and the metadata has those of each record. So the manifest,
which is written last, is what all other bytes are compared with.
"""

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
"""The name that DCP gives this file."""

FORMAT = "aiostage-dcp"
VERSION = 1

_MAX_MANIFEST_BYTES = 64 << 10
"""A longer one is of another kind of checkpoint. Ours has some 150 bytes."""


@dataclass(frozen=True, slots=True)
class Record:
    """Where the bytes of one item are.

    Attributes:
        file: The name of the file.
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


# Metadata is pickled with the name of this class in it. Checkpoints that were written when the class was in that module
# have this name, and those of today are readable there.
Record.__module__ = "aiostage.dcp.storage"


async def read_index(reader: Reader) -> Metadata:
    """Read the metadata of a checkpoint. Its ``storage_data`` has a :class:`Record` for each item.

    Args:
        reader: The reader of the checkpoint.

    Raises:
        CheckpointCorruptError: If it is damaged, or not one of DCP's.
        OSError: If the storage refuses.
    """
    nbytes, expected = _read_manifest(await reader.manifest(), reader.location)
    path = f"{reader.location}/{METADATA_NAME}"
    # The size first: memory is allocated by the length in the manifest, which may be anything.
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
    # As a whole, because the digest is that of the whole record. A rank that needs a part of a shard reads the shard.
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
    """Return the shard of a record, over its bytes."""
    dtype = record.dtype or torch.uint8
    tensor = torch.frombuffer(data, dtype=dtype) if record.nbytes else torch.empty(0, dtype=dtype, device="cpu")
    return tensor.view(record.shape)


def _read_manifest(text: Buffer, location: str) -> tuple[int, str]:
    """Return the length and the digest of the metadata, from a manifest that may be damaged or hostile."""
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
        # A checkpoint of aiostage.save has a manifest of another form.
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
