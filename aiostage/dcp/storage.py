"""DCP's writer and reader over our storages: local disks, object stores, every :class:`~aiostage.abc.Storage`.

A checkpoint is one file for each rank, ``.metadata`` as DCP pickles it, and a manifest. It appears whole or not at all.
The files have the bytes of tensors as they are in memory, so that staged tensors are written without a copy.

DCP calls the methods below in threads of its own and waits for them, so each object has an event loop in a thread. The
order of DCP's calls is: ``reset``, ``set_up_storage_writer``, the two plans, ``write_data`` on each rank, ``finish`` on
the coordinator; and ``reset``, ``read_metadata``, ``set_up_storage_reader``, the two plans, ``read_data`` on each rank.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import pickle
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch.distributed.checkpoint import storage as torch_storage
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.futures import Future

from aiostage._device import CallerStreams, default_backend
from aiostage._private import narrow_by_index
from aiostage.abc import Buffer, MultiWriterCheckpoint, MultiWriterStorage, PendingCheckpoint, Reader, Storage
from aiostage.dcp.keys import load_value, paths_of
from aiostage.dcp.loop_thread import LoopThread
from aiostage.dcp.records import (
    FORMAT,
    METADATA_NAME,
    VERSION,
    Record,
    memory_of,
    read_index,
    read_record,
    tensor_of,
)
from aiostage.errors import shown
from aiostage.format.parts import PART_BYTES, Part, cut, digest, gather, single_piece
from aiostage.storage.locate import Root, storage_at

__all__ = ["StorageReader", "StorageWriter"]

_RECORDS_AT_ONCE = 4
"""Records that a rank reads at once. A guess: enough to hide the latency of an object store."""


@dataclass(frozen=True, slots=True)
class _Share:
    """What a rank needs to write its file. The coordinator sends it with the rank's plan."""

    name: str
    token: str
    file: str


class StorageWriter(torch_storage.StorageWriter):
    """DCP's writer to a storage. A checkpoint appears whole or not at all, and replaces an older one in one step.

    Works with :func:`aiostage.dcp.save` and with ``torch.distributed.checkpoint.save``. Planners must not cache plans:
    a cached plan leads to the files of an earlier save, which is refused.

    Args:
        root: A path, a URL such as ``s3://bucket/prefix``, a store of obstore, or a storage that several processes may
            write at once. Every rank needs to reach the same; each checkpoint lies under its ``checkpoint_id`` below.
        overwrite: Whether a checkpoint of the same name may be replaced.

    Raises:
        TypeError: If the storage does not let several processes write one checkpoint.
    """

    def __init__(self, root: Root, *, overwrite: bool = False) -> None:
        storage = storage_at(root)
        if not isinstance(storage, MultiWriterStorage):
            raise TypeError(
                f"{shown(storage)} is not a MultiWriterStorage, in which several processes may write one checkpoint"
            )
        self._storage = storage
        self._overwrite = overwrite
        self._name: str | None = None
        self._pending: MultiWriterCheckpoint | None = None
        self._token = ""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a checkpoint of a name below the root. One that was not finished is removed."""
        self.abandon()
        self._name = None if checkpoint_id is None else os.fspath(checkpoint_id)

    def set_up_storage_writer(
        self, is_coordinator: bool, *args: Any, use_collectives: bool = True, **kwargs: Any
    ) -> None:
        """Prepare for a save.

        Raises:
            ValueError: If there is no name, or the ranks are not to coordinate.
        """
        if self._name is None:
            raise ValueError("the checkpoint needs a name: pass checkpoint_id, which is taken relative to the root")
        if not use_collectives:
            raise ValueError("this writer needs the ranks to coordinate: pass use_collectives=True")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Open the checkpoint, on the coordinator, and tell every rank how to attach to it."""
        name = str(self._name)

        async def begin() -> None:
            # The coordinator opens it and alone commits it; the others attach by the token, which travels with the
            # plans.
            self._pending = await self._storage.open(name, overwrite=self._overwrite)
            self._token = await self._pending.token()

        self._loop.run(begin())
        return [
            dataclasses.replace(plan, storage_data=_Share(name, self._token, f"rank-{rank:05}.bin"))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[torch_storage.WriteResult]]:
        """Write this rank's file.

        Raises:
            ValueError: If the plan is for another checkpoint: the coordinator's, or an earlier one.
        """
        if plan.storage_data.name != self._name:
            raise ValueError(
                f"this rank saves {shown(self._name)} by a plan for {shown(plan.storage_data.name)}: either it has "
                "followed a cached plan (use a planner with enable_plan_caching=False), or the ranks save different "
                "checkpoints"
            )
        written: Future[list[torch_storage.WriteResult]] = Future()
        # In this thread and not in the loop's: tensors on devices are copied on the streams that are current here.
        contents = [(item, _content(item, planner)) for item in plan.items]
        written.set_result(self._loop.run(self._write(plan.storage_data, contents)))
        return written

    async def _write(
        self, share: _Share, contents: list[tuple[WriteItem, torch.Tensor]]
    ) -> list[torch_storage.WriteResult]:
        # Wide elements first, so that each record begins at a multiple of its elements' size.
        contents.sort(key=lambda pair: -pair[1].element_size() if pair[0].type != WriteItemType.BYTE_IO else 0)
        # The order in the file is this rank's own: every record says where it lies.
        results, offset = [], 0
        for item, tensor in contents:
            pickled = item.type == WriteItemType.BYTE_IO
            record = Record(
                file=share.file,
                offset=offset,
                nbytes=tensor.nbytes,
                digest=digest(memory_of(tensor)),
                dtype=None if pickled else tensor.dtype,
                shape=tuple(tensor.shape),
            )
            results.append(torch_storage.WriteResult(item.index, tensor.nbytes, (share.token, record)))
            offset += tensor.nbytes
        if offset:
            # The coordinator has it already. On other ranks, what attach() returns can only write: a rank can neither
            # commit nor remove the files of others.
            pending: PendingCheckpoint = self._pending or await self._storage.attach(share.name, share.token)
            parts = cut([tensor for _, tensor in contents if tensor.nbytes], PART_BYTES)
            # Only the parts refer to the tensors now, so that each is freed when it has been written.
            contents.clear()
            await pending.write(share.file, offset, _buffers(parts))
        return results

    def finish(self, metadata: Metadata, results: list[list[torch_storage.WriteResult]]) -> None:
        """Write the metadata and make the checkpoint appear, on the coordinator.

        Raises:
            ValueError: If a rank has followed a plan of an earlier save.
            CheckpointExistsError: If another writer was faster and must not be replaced.
        """
        records = {result.index: result.storage_data for written in results for result in written}
        # A cached plan has the token of an earlier save, so its records would lie in files of another checkpoint.
        if any(token != self._token for token, _ in records.values()):
            raise ValueError("a rank has followed a cached plan: use a planner with enable_plan_caching=False")
        metadata.storage_data = {index: record for index, (_, record) in records.items()}
        pickled = pickle.dumps(metadata)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "metadata": {"name": METADATA_NAME, "nbytes": len(pickled), "xxh3_64": digest(memoryview(pickled))},
        }

        async def commit(pending: MultiWriterCheckpoint) -> None:
            await pending.write(METADATA_NAME, len(pickled), _buffers(cut([_tensor(pickled)], PART_BYTES)))
            await pending.commit(memoryview(json.dumps(manifest).encode()))

        assert self._pending is not None  # noqa: S101 - DCP has called prepare_global_plan
        self._loop.run(commit(self._pending))
        self._pending = None

    def abandon(self) -> None:
        """Remove what was written of a checkpoint that was not finished; :func:`aiostage.dcp.save` calls it."""
        # Taken out first, so that a second call finds nothing to abort.
        pending, self._pending = self._pending, None
        if pending is not None:
            self._loop.run(pending.abort())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether it is a name."""
        return isinstance(checkpoint_id, (str, os.PathLike))

    @cached_property
    def _loop(self) -> LoopThread:
        # Started at the first use: some writers are only made to check their arguments.
        return LoopThread("aiostage-dcp-writer")


class StorageReader(torch_storage.StorageReader):
    """DCP's reader of what :class:`StorageWriter` has written, on any number of ranks. Every record is verified.

    Works with :func:`aiostage.dcp.load` and with ``torch.distributed.checkpoint.load``. In both, values come back under
    their own keys, also where these are not text. DCP's planner alone would put them under the text, beside the key
    itself. The metadata is unpickled without running code. The planner unpickles values that are not tensors: that of
    :func:`aiostage.dcp.load` runs no code, that of ``torch.distributed.checkpoint.load`` runs the code that they name.

    Args:
        root: As for the writer; any :class:`~aiostage.abc.Storage` will do.
    """

    def __init__(self, root: Root) -> None:
        self._storage: Storage = storage_at(root)
        self._name: str | None = None
        self._reader: Reader | None = None
        self._records: dict[Any, Record] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Read a checkpoint of a name below the root."""
        self.abandon()
        self._name = None if checkpoint_id is None else os.fspath(checkpoint_id)

    def abandon(self) -> None:
        """Close a checkpoint whose load has failed; :func:`aiostage.dcp.load` does it."""
        # Taken out first, so that a second call finds nothing to close.
        reader, self._reader, self._records = self._reader, None, {}
        if reader is not None:
            self._loop.run(reader.aclose())

    def read_metadata(self, *args: Any, **keywords: Any) -> Metadata:
        """Open the checkpoint and read what is in it.

        Raises:
            ValueError: If there is no name.
            CheckpointNotFoundError: If there is no checkpoint of that name.
            CheckpointCorruptError: If it is damaged, or not one of DCP's.
        """
        if self._name is None:
            raise ValueError("the checkpoint needs a name: pass checkpoint_id, which is taken relative to the root")
        # DCP asks twice where the first answer was an error.
        self.abandon()
        return self._loop.run(self._read_metadata(self._name))

    async def _read_metadata(self, name: str) -> Metadata:
        # Kept before it is read, so that abandon() closes it whatever fails from here on.
        self._reader = await self._storage.read(name)
        return await read_index(self._reader)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **keywords: Any) -> None:
        """Keep where each item is."""
        self._records = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank needs, each record once. Tensors on devices are copied to on the current streams."""
        wanted: dict[Record, list[ReadItem]] = {}
        for item in plan.items:
            # Several items may need parts of one record, for example after resharding. It is read and verified once.
            wanted.setdefault(self._records[item.storage_index], []).append(item)
        has_values = any(item.type == LoadItemType.BYTE_IO for item in plan.items)
        deliver = partial(_deliver, planner, paths_of(planner) if has_values else {})
        self._loop.run(self._read_all(wanted, deliver, CallerStreams.record(default_backend())))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    async def _read_all(
        self,
        wanted: dict[Record, list[ReadItem]],
        deliver: Callable[[ReadItem, Record, Buffer], None],
        caller: CallerStreams,
    ) -> None:
        assert self._reader is not None  # noqa: S101 - DCP has called read_metadata
        reader, records = self._reader, iter(wanted)

        # All tasks take from one iterator, so that each record is read once.
        async def work() -> None:
            for record in records:
                data = await read_record(reader, record)
                # In the loop's thread, on the caller's streams. No await inside: other tasks must not run on them.
                with caller.entered():
                    for item in wanted[record]:
                        deliver(item, record, data)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(_RECORDS_AT_ONCE):
                    group.create_task(work())
        except BaseExceptionGroup as failures:
            # The first of them. As a rule the others failed for the same reason.
            raise failures.exceptions[0] from None
        # DCP reads once, and calls nothing afterwards.
        self._reader = None
        await reader.aclose()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether it is a name."""
        return isinstance(checkpoint_id, (str, os.PathLike))

    @cached_property
    def _loop(self) -> LoopThread:
        return LoopThread("aiostage-dcp-reader")


def _content(item: WriteItem, planner: SavePlanner) -> torch.Tensor:
    """Return the bytes to write for an item as a tensor, in host memory and in index order."""
    data = planner.resolve_data(item)
    if item.type == WriteItemType.BYTE_IO:
        return _tensor(data.getvalue())  # type: ignore[union-attr]
    tensor: torch.Tensor = data  # type: ignore[assignment]
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _deliver(
    planner: LoadPlanner, paths: Mapping[str, tuple[Any, ...]], item: ReadItem, record: Record, data: Buffer
) -> None:
    """Put what was read for an item where the planner wants it."""
    if item.type == LoadItemType.BYTE_IO:
        # Values under keys that are not text, which DCP's own planner would put elsewhere (see keys.py).
        path = paths.get(item.dest_index.fqn)
        if path is None:
            planner.load_bytes(item, io.BytesIO(data))
        else:
            load_value(planner, path, io.BytesIO(data))
        return
    part = narrow_by_index(tensor_of(record, data), item.storage_offsets, item.lengths)
    target = planner.resolve_tensor(item).detach()
    # copy_() would broadcast a smaller part over the whole target.
    if target.size() != part.size():
        raise ValueError(f"{item.dest_index.fqn} has shape {tuple(target.size())}, the checkpoint {tuple(part.size())}")
    target.copy_(part)
    planner.commit_tensor(item, target)


def _tensor(data: bytes) -> torch.Tensor:
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )


async def _buffers(parts: list[Part]) -> AsyncIterator[Buffer]:
    """Iterate over the bytes of parts: the staged memory itself where a part is one piece of it, else a copy."""
    # Taken from the list, so that a part's memory is free when it has been written, and not when all have.
    parts.reverse()
    while parts:
        part = parts.pop()
        memory = single_piece(part)
        if memory is None:
            memory = torch.empty(part.nbytes, dtype=torch.uint8, device="cpu")
            gather(part, memory)
        data = memory_of(memory)
        del part, memory
        yield data
