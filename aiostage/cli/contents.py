"""Checkpoints of all kinds, opened to be described and compared: their entries, and the elements of some tensors."""

from __future__ import annotations

import io
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from anyio.to_thread import run_sync

from aiostage.abc import Reader
from aiostage.checkpoint.foreign import Read, merge_shards, recognize, refuse_chunks
from aiostage.checkpoint.foreign_dcp import DcpDirectory
from aiostage.checkpoint.reader import CheckpointReader, Outline
from aiostage.checkpoint.verify import opened
from aiostage.cli.entries import TreeEntry, entries_of_table, entries_of_tree, tensor_entry
from aiostage.cli.finding import Place
from aiostage.errors import CheckpointCorruptError, CheckpointError, StagingError, said, shown
from aiostage.format.nodes import reading, view_of
from aiostage.format.parts import DIGEST_NAME, digest_of_parts
from aiostage.format.placement import Placement
from aiostage.format.safetensors import DTYPES, HEADER_LENGTH_BYTES, MAX_HEADER_BYTES, read_header
from aiostage.incremental.references import placement_of

__all__ = ["Contents", "describing", "open_contents"]

_LONGEST_VALUE_BYTES = 1 << 20
"""Longer pickled values of DCP's checkpoints are not shown. They are compared by their digests only."""


class Contents(ABC):
    """An open checkpoint.

    Attributes:
        kind: The program that has written it, or the kind of its files.
        entries: All its entries, the root first.
        files: Its files, as JSON.
        left_out: Files and directories beside it that are not described.
    """

    kind: str
    entries: Sequence[TreeEntry]
    files: Sequence[dict[str, Any]]
    left_out: Sequence[str] = ()

    @abstractmethod
    async def read(self, entries: Sequence[TreeEntry]) -> list[torch.Tensor]:
        """Return the elements of tensors in host memory, in order.

        Args:
            entries: Entries of tensors.

        Raises:
            CheckpointCorruptError: If they are damaged.
            OSError: If the storage refuses.
        """


@asynccontextmanager
async def open_contents(place: Place, *, elements: bool = True) -> AsyncIterator[Contents]:
    """Open a checkpoint.

    Args:
        place: Where it is.
        elements: Whether elements of tensors will be read.

    Raises:
        CheckpointError: If it needs code.
        CheckpointNotFoundError: If it was removed meanwhile.
        CheckpointCorruptError: If it is damaged.
        OSError: If the storage refuses.
    """
    if place.read is not None:
        yield await run_sync(partial(_open_foreign, place.read, elements))
    elif place.is_dcp:
        reader = await place.storage.read(place.name)
        try:
            with describing(f"{reader.location}/.metadata"):
                contents = await _Dcp.opened(reader)
            yield contents
        finally:
            await reader.aclose()
    else:
        async with opened((place.storage, place.name)) as (checkpoint, outline):
            placement = await placement_of(place.storage, place.name)
            yield await run_sync(_Ours, checkpoint, outline, placement)


@contextmanager
def describing(path: str) -> Iterator[None]:
    """Turn errors into CheckpointCorruptError while metadata of DCP is used: it may contain anything."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        if isinstance(error, StagingError):
            raise
        raise CheckpointCorruptError(f"it does not describe a checkpoint: {said(error)}.", path=path) from error


class _Ours(Contents):
    """A checkpoint of :func:`aiostage.save`."""

    kind = "aiostage"

    def __init__(self, checkpoint: CheckpointReader, outline: Outline, placement: Placement | None) -> None:
        self._checkpoint, self._outline = checkpoint, outline
        with reading(checkpoint.manifest_path):
            self.entries = list(entries_of_table(outline.table, outline.records))
        self.files = [self._file(each, placement) for each in outline.files]

    def _file(self, each: Any, placement: Placement | None) -> dict[str, Any]:
        file = each.file
        found: dict[str, Any] = {
            "name": file.name,
            "nbytes": file.nbytes,
            "tensors": len(each.records),
            "digest": f"{DIGEST_NAME}:{digest_of_parts(file.digests)}",
        }
        if placement is not None:
            used = Placement({}, {"": placement.files[file.name]}).used()
            found["stored_in"] = [
                {"file": name if source is None else f"{source}/{name}", "nbytes": nbytes}
                for (source, name), nbytes in used.items()
            ]
        return found

    async def read(self, entries: Sequence[TreeEntry]) -> list[torch.Tensor]:
        records = self._outline.records
        sizes = {name: records[name].stop - records[name].start for name in (each.source["name"] for each in entries)}
        data = {name: torch.empty(nbytes, dtype=torch.uint8, device="cpu") for name, nbytes in sizes.items()}
        await self._checkpoint.read(await self._checkpoint.plan(self._outline, data, everything=False))
        found = []
        with reading(self._checkpoint.manifest_path):
            for each in entries:
                view, memory = view_of(each.source, records), data[each.source["name"]]
                # Elements are in index order in the file, except where several leaves share memory.
                found.append(view.over(memory) if "offset" in each.source else memory.view(view.dtype).view(view.shape))
        return found


class _Foreign(Contents):
    """A checkpoint of another program. All of it but the elements of tensors is in memory."""

    def __init__(
        self, kind: str, entries: Sequence[TreeEntry], files: Sequence[dict[str, Any]], left_out: Sequence[str]
    ) -> None:
        self.kind, self.entries, self.files, self.left_out = kind, entries, files, left_out

    async def read(self, entries: Sequence[TreeEntry]) -> list[torch.Tensor]:
        return [await run_sync(self._read, each) for each in entries]

    def _read(self, entry: TreeEntry) -> torch.Tensor:
        found: torch.Tensor = entry.source if isinstance(entry.source, torch.Tensor) else entry.source()
        return found


def _open_foreign(read: Read, elements: bool) -> Contents:
    """Open what another program has written. Blocks."""
    if read.kind == "dcp":
        return _open_dcp_directory(read.path, read.left_out)
    names = [read.path]
    if read.kind == "torch":
        kind, entries = "torch.save", list(entries_of_tree(_torch_tree(read, elements)))
    else:
        if read.kind == "shards":
            kind = "shards of a hub"
            names, tree = merge_shards(read.path, partial(_shard, elements=elements))
        else:
            kind, tree = "safetensors", _map_safetensors(read.path)
        # safetensors does not say which tensors were parameters, so nothing is said of it.
        entries = [replace(entry, more=None) for entry in entries_of_tree(tree)]
    files = [{"name": os.path.basename(name), "nbytes": os.path.getsize(name)} for name in names]
    return _Foreign(kind, entries, files, read.left_out)


def _shard(path: str, *, elements: bool) -> Any:
    read = recognize(path)
    if read is None and not os.path.lexists(path):
        raise FileNotFoundError(path)
    if read is None or read.kind not in ("torch", "safetensors"):
        return None
    return _torch_tree(read, elements) if read.kind == "torch" else _map_safetensors(path)


def _torch_tree(read: Read, elements: bool) -> Any:
    """Read a file of torch.save: without elements, or with a mapping of them if it is an archive."""
    try:
        if not elements:
            return torch.load(read.path, map_location="meta", weights_only=True)
        return torch.load(read.path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        # The legacy format cannot be mapped. For any other failure, this raises the error with our words.
        return read(False)


def _map_safetensors(path: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, over a private mapping of it: pages are read when elements are."""
    with open(path, "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        # The file may claim any length. Memory is allocated by it.
        if length > min(MAX_HEADER_BYTES, nbytes - HEADER_LENGTH_BYTES):
            raise CheckpointCorruptError(f"its header is said to be {length} bytes long.", path=path)
        start = HEADER_LENGTH_BYTES + length
        header = file.read(length)
        records = read_header(header, nbytes - start, path=path)
        refuse_chunks(header, path)
        # A private mapping: torch.frombuffer() wants writable memory, and nothing that is written reaches the file.
        memory = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    found = {}
    for record in records:
        data = memory[start + record.start : start + record.stop]
        dtype = DTYPES[record.dtype]
        # view() needs an offset that is a multiple of the element's size, which the format does not promise.
        if data.storage_offset() % dtype.itemsize:
            data = data.clone()
        found[record.name] = data.view(dtype).view(record.shape)
    return found


def _open_dcp_directory(path: str, left_out: Sequence[str]) -> Contents:
    directory = DcpDirectory(path)
    entries, sizes = [TreeEntry((), "container", f"state dict of {len(directory.entries)}")], {}
    for name, entry in directory.entries.items():
        steps = tuple(map(str, directory.path_of(name)))
        places = directory.places(name)
        for file, _, _ in places:
            sizes[file] = os.path.getsize(file)
        read = partial(directory.value, name)
        if directory.is_tensor(name):
            more = {"chunks": len(places)}
            entries.append(tensor_entry(steps, directory.dtype(name), entry.size, more=more, source=read))
        else:
            entries += _value_entries(steps, sum(nbytes for *_, nbytes in places), read)
    files = [{"name": os.path.basename(file), "nbytes": nbytes} for file, nbytes in sorted(sizes.items())]
    return _Foreign("torch.distributed.checkpoint", entries, files, left_out)


def _value_entries(steps: tuple[str, ...], nbytes: int, read: Any, digest: str | None = None) -> list[TreeEntry]:
    """Return the entries of a value that DCP has pickled. One that needs code, or is too long, gets one entry."""
    text = f"pickled, {nbytes} bytes" + (f", {digest}" if digest is not None else "")
    unread = [TreeEntry(steps, "object", text, more={"pickled": digest if digest is not None else nbytes})]
    if nbytes > _LONGEST_VALUE_BYTES:
        return unread
    try:
        return list(entries_of_tree(read(), steps))
    except CheckpointCorruptError:
        raise
    except CheckpointError:
        return unread


class _Dcp(Contents):
    """A checkpoint of :mod:`aiostage.dcp`."""

    kind = "aiostage.dcp"

    def __init__(self, reader: Reader) -> None:
        # Imported late: torch.distributed.checkpoint takes long, and few need it.
        self._dcp = import_module("aiostage.dcp.records")
        self._reader = reader
        self.entries: list[TreeEntry] = []
        self.files: list[dict[str, Any]] = []

    @classmethod
    async def opened(cls, reader: Reader) -> _Dcp:
        """Read the metadata, and the values that are not tensors."""
        self = cls(reader)
        read_value = import_module("aiostage.dcp.unpickling").read_value
        metadata = await self._dcp.read_index(reader)
        paths: Mapping[str, Any] = metadata.planner_data or {}
        shards: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
        for index, record in metadata.storage_data.items():
            shards.setdefault(index.fqn, []).append((tuple(index.offset or ()), record))
        self.entries.append(TreeEntry((), "container", f"state dict of {len(metadata.state_dict_metadata)}"))
        for name, about in metadata.state_dict_metadata.items():
            steps, records = tuple(map(str, paths.get(name, (name,)))), shards.get(name, [])
            if hasattr(about, "chunks"):
                more = {"chunks": len(records)}
                source = (name, about, records)
                self.entries.append(tensor_entry(steps, about.properties.dtype, about.size, more=more, source=source))
                continue
            if len(records) != 1:
                raise CheckpointCorruptError(f"it does not say where {shown(name)} is.", path=reader.location)
            record = records[0][1]
            data = b"" if record.nbytes > _LONGEST_VALUE_BYTES else await self._dcp.read_record(reader, record)
            value = partial(_unpickled, read_value, data)
            self.entries += _value_entries(steps, record.nbytes, value, record.digest)
        sizes: dict[str, int] = {}
        for record in metadata.storage_data.values():
            sizes[record.file] = max(sizes.get(record.file, 0), record.offset + record.nbytes)
        for name, nbytes in sorted(sizes.items()):
            found = await reader.size(name)
            if found < nbytes:
                reason = f"expected {nbytes} bytes, got {found}."
                raise CheckpointCorruptError(reason, path=f"{reader.location}/{name}")
            self.files.append({"name": name, "nbytes": found})
        return self

    async def read(self, entries: Sequence[TreeEntry]) -> list[torch.Tensor]:
        with describing(f"{self._reader.location}/.metadata"):
            return [await self._tensor(*each.source) for each in entries]

    async def _tensor(self, name: str, about: Any, shards: Sequence[tuple[tuple[int, ...], Any]]) -> torch.Tensor:
        # Metadata may claim any shape. No more memory is allocated than there are bytes in the files.
        if about.size.numel() * about.properties.dtype.itemsize > sum(record.nbytes for _, record in shards):
            raise CheckpointCorruptError(f"the shards of {shown(name)} do not cover it.", path=self._reader.location)
        made = torch.empty(about.size, dtype=about.properties.dtype, device="cpu")
        # Counted, because elements that no shard covers would be whatever the memory has.
        filled = 0
        for offsets, record in shards:
            part = self._dcp.tensor_of(record, await self._dcp.read_record(self._reader, record))
            target = made
            for dimension, (offset, length) in enumerate(zip(offsets, part.shape, strict=True)):
                target = target.narrow(dimension, offset, length)
            target.copy_(part)
            filled += part.numel()
        if filled != made.numel():
            raise CheckpointCorruptError(f"the shards of {shown(name)} do not cover it.", path=self._reader.location)
        return made


def _unpickled(read_value: Any, data: Any) -> Any:
    return read_value(io.BytesIO(data), weights_only=True)
