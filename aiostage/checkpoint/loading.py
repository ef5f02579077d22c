"""One load under way: its threads, its memory, and what it does to a live tree.

``Loading.attempt`` reads a checkpoint of aiostage, ``Loading.adopt`` takes over one of another program. Both end in a
new tree, or in a :class:`Transfer` that is carried out in a live one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch

from aiostage._arguments import stateful_in
from aiostage._copy.host import copy_tensors
from aiostage._copy.to_device import HostToDeviceCopier, TensorCopy
from aiostage._device import CallerStreams, CopyStreams, device_errors
from aiostage._loop.coroutines import RarerCollections, Slices, finish
from aiostage._loop.workers import Job, Workers, empty_in_steps, releasing_gil
from aiostage._memory.pinned import Pinning
from aiostage.abc import Backend, Storage
from aiostage.checkpoint.foreign import Read, recognize
from aiostage.checkpoint.into import Fit, compare
from aiostage.checkpoint.part_reader import THREADS, ReadTargets
from aiostage.checkpoint.progress import LoadProgress
from aiostage.checkpoint.reader import CheckpointReader, OpenCheckpoint, Outline
from aiostage.checkpoint.selection import Selection
from aiostage.checkpoint.targets import Devices, ReadPlan, host_memory, plan_reads
from aiostage.checkpoint.transfer import Transfer
from aiostage.format.classes import Classes
from aiostage.format.decode import check_sparse, parts_of_sparse
from aiostage.format.manifest import FileRecord
from aiostage.format.nodes import LEFT_OUT, View, contents_of, sizes_of, strided_layouts
from aiostage.format.parts import Part
from aiostage.format.registry import is_value
from aiostage.observe import span
from aiostage.storage.local import LocalStorage

__all__ = ["Loading"]

T = TypeVar("T")

_MAX_HOLD = 0.001
"""How long a comparison with a live tree may hold the event loop at a time, in seconds: the default of
``max_loop_hold``, since a load has no option of its own for it."""


class Loading:
    """One load under way: its threads, its memory, and what it does to a live tree.

    Enter it with ``async with``; :meth:`attempt` may be called again after it has raised.
    """

    def __init__(
        self,
        into: Any,
        selection: Selection | None,
        in_place: bool,
        verify: bool,
        devices: Devices,
        backend: Backend | None,
        classes: Classes,
        caller: CallerStreams,
        *,
        name: str,
        report: Callable[[LoadProgress], object] | None,
        fit: Fit,
    ) -> None:
        self._into = into
        self._selection = selection
        self._in_place = in_place
        self._verify = verify
        # Of a part of the tree only the bytes that it needs are read, so not every digest can be compared.
        self._reads_everything = verify and selection is None
        self._devices = devices
        self._classes = classes
        self._caller = caller
        self._name = name
        self._report = report
        self._fit = fit
        self._stateful = stateful_in(into, is_value)
        # Large containers that an attempt no longer needs. They are emptied in a thread: if they ended with the
        # variables of coroutines, they would hold the event loop.
        self._leftovers: list[list[Any] | dict[Any, Any]] = []
        self._workers = Workers(THREADS, "aiostage-load", prepare=torch.get_num_threads, switches_soon=True)
        if backend is None or backend.unavailable_reason is not None:
            self._targets = ReadTargets(self._workers)
            return
        with device_errors():
            # Pinned memory is registered with a device. Only one that is in use already is taken, because a load has no
            # reason to initialize another.
            first_device = next(iter(backend.active_devices()), None)
        pinning = Pinning(backend) if backend.pinned_memory_reason is None else None
        self._targets = ReadTargets(
            self._workers,
            backend.device_of,
            HostToDeviceCopier(backend, CopyStreams(backend), caller),
            first_device,
            pinning,
        )

    async def __aenter__(self) -> Loading:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give memory back and let the threads end. Memory that a device still copies from is kept until it is done."""
        if self._targets.copier is not None:
            # After a load that has ended well there is nothing to abandon. After an error devices may still copy: a
            # thread keeps that memory until they are done, so nothing here has to wait for them.
            self._targets.copier.abandon()
        self._targets.close()
        # A coroutine that is being closed may not wait. The pool is closed above, so its memory goes with its last
        # reference.
        if not isinstance(error, GeneratorExit):
            await self._targets.aclose()
        self._workers.stop()

    async def recognize(self, storage: Storage, name: str) -> Read | None:
        """Return what reads a checkpoint of another program, if there is one at a local path."""
        if not isinstance(storage, LocalStorage):
            return None
        return await self._workers.run(partial(recognize, os.path.join(storage.location, name)))

    async def adopt(self, read: Read) -> Any:
        """Read a checkpoint of another program, and do with it what was asked for."""
        tree = await self._workers.run(partial(read, self._verify))
        if self._selection is not None:
            instead = None if self._into is None else LEFT_OUT
            tree = await self._run(partial(self._selection.prune_tree, tree, instead))
        return tree if self._into is None else await self._put(tree)

    async def _put(self, tree: Any) -> Any:
        """Change the live tree to a loaded one."""
        with span("compare"):
            transfer = await self._compare(tree)
            devices = await self._run(partial(self._fill, transfer))
        self._follow_the_caller(devices)
        with span("into"):
            await self._carry_out(transfer)
        if transfer.states:
            try:
                # On the event loop, because it is the user's code; on the streams of the call, because the copies above
                # are ordered before those.
                with self._caller.entered():
                    for live, state in transfer.states:
                        live.load_state_dict(state)
            finally:
                self._caller.order_current_stream_after()
        return self._into

    async def _compare(self, tree: Any) -> Transfer:
        """Compare the live tree with a loaded one: on the event loop, where the live tree may change between slices."""
        comparing = compare(
            self._into,
            tree,
            self._selection.chooses if self._selection is not None else None,
            inference=self._caller.inference,
            fit=self._fit,
            stateful=self._stateful,
        )
        return await Slices(_MAX_HOLD).run(comparing)

    def _fill(self, transfer: Transfer) -> set[torch.device]:
        """Have loaded tensors copied into their live ones, and return the devices of these."""
        devices: set[torch.device] = set()
        for _, live, loaded in releasing_gil(transfer.pairs):
            device = self._targets.device_of(live)
            if device is not None:
                devices.add(device)
            transfer.add(live, loaded, device)
        return devices

    async def attempt(self, reader: OpenCheckpoint) -> Any:
        """Read one checkpoint. Call :meth:`drop_leftovers` after it."""
        # A new list: the memory of an attempt that has failed must not live as long as this one.
        leftovers = self._leftovers = []
        checkpoint = CheckpointReader(
            reader,
            self._workers,
            self._run,
            self._targets,
            verify=self._verify,
            progress=self._progressed,
            in_place=self._in_place,
        )
        # Reads only the manifest and headers. What can be refused by these is refused before tensors are read.
        outline = await checkpoint.open()
        names = await checkpoint.names(outline, self._selection, None if self._into is None else LEFT_OUT)
        leftovers += (*await self._workers.run(outline.containers), names)
        spread = await self._workers.run(
            partial(strided_layouts, outline.table, outline.records, outline.positions, path=checkpoint.manifest_path)
        )
        if self._into is None:
            return await self._read_anew(checkpoint, outline, names, spread)
        if self._stateful:
            # load_state_dict needs complete states. Those that the objects have now may differ from the loaded ones.
            tree = await self._read_anew(checkpoint, outline, names, spread)
            return await self._put(tree)
        # First the tensors that become something else in the tree, such as arrays and parts of sparse tensors: they
        # are needed to compare the trees. All others have only a size until both trees are known to fit.
        data = await self._read_first(checkpoint, outline, names, spread)
        tree, memory = await checkpoint.decode(outline, data, self._classes)
        leftovers.append(data)
        with span("compare"):
            transfer = await self._compare(tree)
            placement = await self._run(
                partial(
                    plan_reads,
                    transfer,
                    memory,
                    outline.positions,
                    self._targets.device_of,
                    in_place=self._in_place,
                    path=checkpoint.manifest_path,
                )
            )
        parts = await checkpoint.plan(outline, placement.contents, everything=self._reads_everything)
        leftovers += (transfer.pairs, transfer.found, placement.contents, parts, *(part.pieces for _, part in parts))
        self._follow_the_caller(await self._run(partial(self._devices_of, placement, transfer)))
        # Only with in_place: live tensors that bytes of files go straight into.
        if placement.direct:
            await self._read_in_place(checkpoint, parts, placement.direct)
        else:
            await checkpoint.read(parts)
        with span("into"):
            await self._carry_out(transfer)
        return self._into

    async def drop_leftovers(self) -> None:
        """Drop what :meth:`attempt` has left, in a thread. A cancellation is delivered when that is done."""
        await finish(partial(self._workers.run, partial(empty_in_steps, self._leftovers)))

    async def _read_anew(
        self,
        checkpoint: CheckpointReader,
        outline: Outline,
        names: Mapping[str, bool],
        spread: Mapping[str, View],
    ) -> Any:
        """Read into a new tree."""
        path, leftovers = checkpoint.manifest_path, self._leftovers
        with RarerCollections():
            sizes = await self._workers.run(partial(sizes_of, names, outline.records, spread))
            shares = await self._run(partial(self._devices.shares, outline.table, outline.records, sizes, path=path))
            data = await self._devices.allocate(shares, self._caller, workers=self._workers, path=path)
            of_sparse, beside = await self._workers.run(partial(_memory_for_sparse, outline, data, path))
            read = data | beside if beside else data
            contents = await self._workers.run(partial(contents_of, read, spread))
        leftovers += (sizes, data, read, contents)
        # Bytes without a destination are read too then, so that every digest of the files is compared.
        everything = self._reads_everything and len(contents) == len(data)
        parts = await checkpoint.plan(outline, contents, everything=everything)
        leftovers += (parts, *(part.pieces for _, part in parts))
        # The allocator may have given memory that was freed on the caller's streams, and kernels that were enqueued
        # there before may still use it.
        self._follow_the_caller(device for device in shares if device is not None and device.type != "meta")
        await checkpoint.read(parts)
        if of_sparse:
            # Before the tree is built: PyTorch's kernels do not check the indices of a sparse tensor.
            await self._workers.run(partial(check_sparse, outline.table, outline.records, read, path))
            await self._copy_to_devices({data[name]: read[name] for name in beside})
        tree, _ = await checkpoint.decode(outline, data, self._classes)
        return tree

    async def _copy_to_devices(self, pairs: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Copy host memory to new memory of devices."""
        copier = self._targets.copier
        for live, value in pairs.items():
            device = self._targets.device_of(live)
            if copier is not None and device is not None:
                await self._workers.run(partial(copier.enqueue, TensorCopy([live], [value], device)))
        if copier is not None:
            await copier.wait_for_all()

    async def _read_first(
        self, checkpoint: CheckpointReader, outline: Outline, names: Mapping[str, bool], spread: Mapping[str, View]
    ) -> dict[str, torch.Tensor]:
        """Read what is needed to compare the trees. Other tensors get memory on the meta device: a size, no bytes."""
        path, meta = checkpoint.manifest_path, torch.device("meta")
        first = {name: plain for name, plain in names.items() if not plain}
        others = {name: plain for name, plain in names.items() if plain}
        data = await self._workers.run(partial(_host_memory, first, outline, spread, path))
        if first:
            contents = await self._workers.run(partial(contents_of, data, spread))
            await checkpoint.read(await checkpoint.plan(outline, contents, everything=False))
            await self._workers.run(partial(check_sparse, outline.table, outline.records, data, path))
        return data | await self._workers.run(partial(_host_memory, others, outline, spread, path, meta))

    async def _read_in_place(
        self, checkpoint: CheckpointReader, parts: Sequence[tuple[FileRecord, Part]], live: Sequence[torch.Tensor]
    ) -> None:
        """Read into live tensors, and raise their versions, because PyTorch does not see that their memory changes."""

        async def count() -> None:
            await self._workers.run(partial(_count_changes, live))

        # Before the first byte: a staging that is under way must find its copy torn, even if this load fails half-way.
        # And after the last byte, for a staging that began in between.
        await count()
        try:
            await checkpoint.read(parts)
        except BaseException as error:
            error.add_note("Tensors of the live tree were being read into: some have new values, some old ones.")
            if isinstance(error, GeneratorExit):
                # A coroutine that is being closed may not wait for a thread.
                _count_changes(live)
            else:
                await finish(count)
            raise
        await finish(count)

    async def _run(self, call: Callable[[], T]) -> T:
        """Run a call in a worker thread, with the modes and streams of the caller's thread.

        For what makes tensors, or calls functions of the caller.
        """
        return await self._workers.run(partial(self._as_caller, call))

    def _as_caller(self, call: Callable[[], T]) -> T:
        # Streams of a device that has failed cannot be entered. The failure matters only if something is on that
        # device, and then the copy to it raises the error.
        streams = nullcontext() if self._caller.failed else self._caller.entered()
        with self._caller.modes(), streams:
            return call()

    def _progressed(self, read_bytes: int, total_bytes: int) -> None:
        if self._report is not None:
            self._report(LoadProgress(name=self._name, total_bytes=total_bytes, read_bytes=read_bytes))

    def _devices_of(self, placement: ReadPlan, transfer: Transfer) -> set[torch.device]:
        """Return the devices of live tensors that are read into or copied to."""
        devices = {device for device, _, _ in transfer.batches() if device is not None}
        for tensor in releasing_gil(placement.direct):
            device = self._targets.device_of(tensor)
            if device is not None:
                devices.add(device)
        return devices

    def _follow_the_caller(self, devices: Iterable[torch.device]) -> None:
        """Have copies to devices wait for what the caller has enqueued there until now."""
        copier = self._targets.copier
        if copier is None:
            return
        # The streams are recorded again: live tensors may be changed until they are read into, so the copies also
        # follow what was enqueued since the call.
        self._caller.renew()
        for device in devices:
            copier.follow_the_caller(device)
            # By now this device is in use, so memory may be registered with it if there was no other.
            self._targets.device = self._targets.device or device

    async def _carry_out(self, transfer: Transfer) -> None:
        """Change the live tree. Shielded from cancellation: half a load would be a mixture of two states."""
        # The last check. A cancellation is delivered here, while nothing has changed, or after all has changed.
        await self._workers.run(partial(transfer.check_live, cast=self._fit.cast))
        # No await from here to finish(): between two changed tensors nothing may break off.
        job = self._workers.job()
        for device, live, loaded in transfer.batches():
            job.put(partial(self._copy, device, live, loaded))
        job.close()
        await finish(partial(self._complete, transfer, job))

    def _copy(self, device: torch.device | None, live: list[torch.Tensor], loaded: list[torch.Tensor]) -> None:
        if device is not None and self._targets.copier is not None:
            # Cast in host memory, since the copier copies bytes.
            values = [value.to(target.dtype) for target, value in zip(live, loaded, strict=True)]
            self._targets.copier.enqueue(TensorCopy(live, values, device))
        else:
            copy_tensors(live, loaded)

    async def _complete(self, transfer: Transfer, job: Job) -> None:
        await job.settled()
        if job.error is not None:
            raise job.error
        if self._targets.copier is not None:
            await self._targets.copier.wait_for_all()
        # Last, when all tensors have their values: values that are not tensors change in one step of the event loop.
        transfer.assign()


def _memory_for_sparse(
    outline: Outline, data: Mapping[str, torch.Tensor], path: str
) -> tuple[bool, dict[str, torch.Tensor]]:
    """Return whether sparse tensors have parts to read, and host memory for those parts that go to devices. Blocks.

    Indices are checked in host memory: a check on a device would wait for everything that is enqueued there.
    """
    names = [name for name in parts_of_sparse(outline.table, path) if not data[name].is_meta]
    beside = {name: data[name].numel() for name in names if not data[name].is_cpu}
    return bool(names), host_memory(beside, path=path)


def _host_memory(
    names: Mapping[str, bool],
    outline: Outline,
    spread: Mapping[str, View],
    path: str,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """Return new memory for some tensors of files. Blocks."""
    return host_memory(sizes_of(names, outline.records, spread), path=path, device=device)


def _count_changes(live: Sequence[torch.Tensor]) -> None:
    """Raise the versions of tensors, by which a staging under way notices the change."""
    for tensor in releasing_gil(live):
        # Tensors that were made in inference mode have no version.
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
