"""Checkpoints of other programs: what a file is, and reading those that need no code. Everything here blocks."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pickle import UnpicklingError
from typing import Any

import torch

from aiostage.errors import CheckpointCorruptError, CheckpointError
from aiostage.format.safetensors import DTYPES, HEADER_LENGTH_BYTES, MAX_HEADER_BYTES, METADATA, read_header

__all__ = ["DAMAGED_ARCHIVE", "Read", "recognize", "shards_of"]


@dataclass(frozen=True, slots=True)
class Read:
    """Reads a checkpoint of another program; called with whether its checksums are to be compared. Blocks.

    Attributes:
        kind: ``"torch"``, ``"safetensors"``, ``"shards"`` for an index of such files, or ``"dcp"``.
        path: The path of the file, or of the directory of a checkpoint of ``torch.distributed.checkpoint``.
        reads: What reads it.
    """

    kind: str
    path: str
    reads: Callable[[str, bool], Any]

    def __call__(self, verify: bool) -> Any:
        """Read all of it."""
        return self.reads(self.path, verify)


DAMAGED_ARCHIVE = (
    zipfile.BadZipFile,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    zlib.error,
)
"""What reading an archive raises that is damaged: members seem to be compressed in odd ways, or encrypted."""

_MAX_INDEX_BYTES = 100 << 20
_START_BYTES = 64
_LEGACY_TORCH = bytes.fromhex("80028a0a6cfc9c46f9206aa850")
"""A pickle of protocol 2, and in it the number that files of ``torch.save`` began with before they were archives."""

_OTHERS = (
    (b"GGUF", "a GGUF file", "Read it with the package gguf."),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "Read it with h5py, or with the Keras that has written it."),
    (b"\x93NUMPY", "an array of NumPy", "Read it with numpy.load()."),
    (b"\x80", "a pickle, which can run any code", "Read it with pickle.load() if you trust its author."),
)
_OTHER_DIRECTORIES = (
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed", "Make one file of it with zero_to_fp32.py, and load that."),
    ("_model_states.pt", "a part of a checkpoint of DeepSpeed", "Read it with deepspeed.utils.zero_to_fp32."),
    (".data-00000-of-00001", "a checkpoint of TensorFlow", "Read it with tensorflow.train.load_checkpoint()."),
)
_SAFETENSORS = ".safetensors"
_INDEX = ".safetensors.index.json"
_TORCH_INDEX = ".bin.index.json"


def recognize(path: str) -> Read | None:
    """Find out what is at a path that is not a checkpoint of aiostage. Blocks.

    Returns:
        What reads it; None if there is nothing, or nothing that is known.

    Raises:
        CheckpointError: If it is known and cannot be read here, with what it is and what reads it.
        OSError: If the system refuses.
    """
    if os.path.isdir(path):
        return _recognize_directory(path, sorted(os.listdir(path)))
    return _recognize_file(path) if os.path.isfile(path) else None


def _recognize_directory(path: str, names: list[str]) -> Read | None:
    if ".metadata" in names:
        return Read("dcp", path, _read_distributed)
    if any(_is_ours(os.path.join(path, name)) for name in names if name.endswith(_SAFETENSORS)):
        # Its manifest is missing, and with it the checksums and what was not a tensor: that is a loss to report.
        return None
    for ending in (_INDEX, _TORCH_INDEX):
        found = [name for name in names if name.endswith(ending)]
        if found:
            return _recognize_file(os.path.join(path, _one(path, found)))
    found = [name for name in names if name.endswith(_SAFETENSORS)]
    if found:
        return _recognize_file(os.path.join(path, _one(path, found)))
    if "pytorch_model.bin" in names:
        return _recognize_file(os.path.join(path, "pytorch_model.bin"))
    if "_CHECKPOINT_METADATA" in names or "manifest.ocdbt" in names:
        raise _cannot(path, "a checkpoint of Orbax", "Read it with orbax-checkpoint.")
    for ending, what, remedy in _OTHER_DIRECTORIES:
        if any(name.endswith(ending) for name in names):
            raise _cannot(path, what, remedy)
    if any(name.endswith(".distcp") for name in names):
        raise _cannot(path, "a distributed checkpoint without its .metadata, whose save did not end", None)
    return None


def _is_ours(path: str) -> bool:
    """Return whether a file was written as a part of a checkpoint of aiostage."""
    with open(path, "rb") as file:
        return file.read(HEADER_LENGTH_BYTES + len(METADATA))[HEADER_LENGTH_BYTES:] == METADATA


def _one(path: str, names: list[str]) -> str:
    """Return the one name that there is, or the usual one among several."""
    for usual in ("model.safetensors", f"model{_INDEX}", f"pytorch_model{_TORCH_INDEX}"):
        if usual in names:
            return usual
    if len(names) > 1:
        raise _cannot(path, f"a directory with {len(names)} such files: {', '.join(names)[:200]}", "Pass one of them.")
    return names[0]


def _recognize_file(path: str) -> Read | None:
    if path.endswith((_INDEX, _TORCH_INDEX)):
        return Read("shards", path, _read_shards)
    with open(path, "rb") as file:
        start = file.read(_START_BYTES)
        nbytes = os.fstat(file.fileno()).st_size
    if not nbytes:
        raise _cannot(path, "an empty file", None)
    if start.startswith(b"PK"):
        return _recognize_archive(path)
    if start.startswith(_LEGACY_TORCH):
        return Read("torch", path, _read_torch)
    length = int.from_bytes(start[:HEADER_LENGTH_BYTES], "little")
    if start[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + 1] == b"{" and length <= nbytes - HEADER_LENGTH_BYTES:
        return Read("safetensors", path, _read_safetensors)
    for magic, what, remedy in _OTHERS:
        if start.startswith(magic):
            raise _cannot(path, what, remedy)
    return None


def _recognize_archive(path: str) -> Read:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointCorruptError(f"it is an archive that cannot be opened: {error}.", path=path) from error
    if "constants.pkl" in names:
        raise _cannot(path, "a TorchScript module, which is code", "Read it with torch.jit.load().")
    if "archive_format" in names:
        raise _cannot(path, "an exported program, which is code", "Read it with torch.export.load().")
    if "data.pkl" in names:
        return Read("torch", path, _read_torch)
    if any(name.endswith(".npy") for name in names):
        raise _cannot(path, "an archive of arrays of NumPy", "Read it with numpy.load().")
    raise _cannot(path, "an archive, but not one of torch.save", None)


def _cannot(path: str, what: str, remedy: str | None) -> CheckpointError:
    return CheckpointError(f"it is {what}, and no checkpoint that can be read here.", path=path, remedy=remedy)


def _read_distributed(path: str, verify: bool) -> Any:
    # By name, since it takes a while to import what few need.
    return import_module("aiostage.checkpoint.foreign_dcp").read_dcp(path)


def _read_torch(path: str, verify: bool) -> Any:
    """Read a file of ``torch.save``, those of Lightning among them, without running what it names."""
    if verify and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except DAMAGED_ARCHIVE as error:
            raise CheckpointCorruptError(f"it is a damaged archive: {error}.", path=path) from error
        if damaged is not None:
            raise CheckpointCorruptError(
                f"{damaged!r:.80} in it does not match its checksum.",
                path=path,
                remedy="If it was saved with set_crc32_options(False), it has none: pass verify=False.",
            )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        name = str(error).partition("GLOBAL ")[2].split(" ")[0]
        raise CheckpointError(
            f"it is a file of torch.save that needs {name[:80] or 'more than data'}, which weights_only=True refuses.",
            path=path,
            remedy="If you trust the file, declare that by torch.serialization.add_safe_globals([...]), or read it "
            "with torch.load(weights_only=False).",
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # A damaged pickle may ask for anything.
        raise CheckpointCorruptError(f"it is a damaged file of torch.save: {error!r:.200}.", path=path) from error


def _read_safetensors(path: str, verify: bool) -> dict[str, torch.Tensor]:
    """Read all tensors of a file. The format has no checksums; its header is checked always."""
    with open(path, "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        if length > min(MAX_HEADER_BYTES, nbytes - HEADER_LENGTH_BYTES):
            raise CheckpointCorruptError(f"its header is said to be {length} bytes long.", path=path)
        records = read_header(file.read(length), nbytes - HEADER_LENGTH_BYTES - length, path=path)
        found: dict[str, torch.Tensor] = {}
        for record in records:
            memory = bytearray(record.stop - record.start)
            if file.readinto(memory) != len(memory):
                raise CheckpointCorruptError("it ended while it was read.", path=path)
            if memory:
                tensor = torch.frombuffer(memory, dtype=torch.uint8)
            else:
                tensor = torch.empty(0, dtype=torch.uint8, device="cpu")
            found[record.name] = tensor.view(DTYPES[record.dtype]).view(record.shape)
    return found


def shards_of(path: str) -> dict[str, str]:
    """Return for each tensor the file beside an index that has it. Blocks.

    Raises:
        CheckpointCorruptError: If it is not an index.
        OSError: If the system refuses.
    """
    try:
        if os.path.getsize(path) > _MAX_INDEX_BYTES:
            raise ValueError("it is too long")
        with open(path, "rb") as file:
            where: dict[str, str] = json.load(file)["weight_map"]
        shards = set(where.values())
        if not all(isinstance(name, str) and os.path.basename(name) == name and name[0] != "." for name in shards):
            raise ValueError("it names files outside of its directory")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointCorruptError(f"it is not an index of shards: {error!r:.200}.", path=path) from error
    return where


def _read_shards(path: str, verify: bool) -> dict[str, torch.Tensor]:
    """Read the files that an index names, as hubs have them."""
    directory = os.path.dirname(path)
    where = shards_of(path)
    found: dict[str, torch.Tensor] = {}
    for name in sorted(set(where.values())):
        shard = os.path.join(directory, name)
        try:
            read = _recognize_file(shard)
        except FileNotFoundError:
            raise CheckpointCorruptError("the index names it, and it is missing.", path=shard) from None
        loaded = read(verify) if read is not None else None
        if not isinstance(loaded, dict):
            raise CheckpointCorruptError("the index names it, and it has no tensors by name.", path=shard)
        found |= loaded
    missing = [name for name in where if name not in found]
    if missing:
        raise CheckpointCorruptError(f"it names {missing[0]!r:.80}, which no shard has.", path=path)
    return found
