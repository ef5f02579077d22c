"""Reads a checkpoint back to a tree, or into a live one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import Any, TypeVar

import torch

from aiostage._arguments import check_flags, stateful_in
from aiostage._copy.host import copy_tensors
from aiostage._copy.to_device import HostToDeviceCopier, TensorCopy
from aiostage._device import CallerStreams, CopyStreams, default_backend, device_errors
from aiostage._loop.coroutines import RarerCollections, Slices, finish, named
from aiostage._loop.workers import Job, Workers, empty_in_steps, releasing_gil
from aiostage._memory.pinned import Pinning
from aiostage.abc import Backend, Storage
from aiostage.checkpoint.foreign import Read, recognize
from aiostage.checkpoint.into import Fit, StrictOption, compare
from aiostage.checkpoint.part_reader import THREADS, ReadTargets
from aiostage.checkpoint.progress import LoadProgress, ProgressOption, reporting
from aiostage.checkpoint.reader import CheckpointReader, OpenCheckpoint, Outline, open_checkpoint
from aiostage.checkpoint.selection import Only, Selection
from aiostage.checkpoint.targets import DeviceOption, Devices, ReadPlan, host_memory, plan_reads
from aiostage.checkpoint.transfer import Transfer
from aiostage.errors import CheckpointError, CheckpointNotFoundError, shown
from aiostage.format.classes import Classes, declared_safe
from aiostage.format.decode import check_sparse, parts_of_sparse
from aiostage.format.manifest import FileRecord
from aiostage.format.nodes import LEFT_OUT, View, contents_of, sizes_of, strided_layouts
from aiostage.format.parts import Part
from aiostage.format.registry import is_value
from aiostage.incremental.reading import is_removed
from aiostage.observe import span
from aiostage.storage.local import LocalStorage
from aiostage.storage.locate import Target, locate

__all__ = ["Loading", "load", "load_after"]

T = TypeVar("T")

_MAX_HOLD = 0.001
"""How long a comparison with a live tree may hold the event loop at a time, in seconds."""


class Loading:
    """One load under way: its threads, its memory, and what it does to a live tree."""

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
        self._devices = devices
        self._classes = classes
        self._caller = caller
        self._name = name
        self._report = report
        self._fit = fit
        self._stateful = stateful_in(into, is_value)
        self._workers = Workers(THREADS, "aiostage-load", prepare=torch.get_num_threads)
        if backend is None or backend.unavailable_reason is not None:
            self._targets = ReadTargets(self._workers)
            return
        with device_errors():
            # To register memory with. No device is begun to be used for that.
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
        """Give memory back and let the threads end. What devices may still be copying is watched over."""
        if self._targets.copier is not None:
            # Nothing is left after a load that has ended well. After an error a thread keeps the memory of what devices
            # still copy.
            self._targets.copier.abandon()
        self._targets.close()
        # A coroutine that is being closed may not wait.
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
                # On the event loop, because the user's code runs, but on the streams of the call: the copies above were
                # ordered before these.
                with self._caller.entered():
                    for live, state in transfer.states:
                        live.load_state_dict(state)
            finally:
                self._caller.order_current_stream_after()
        return self._into

    async def _compare(self, tree: Any) -> Transfer:
        """Compare the live tree with a loaded one, on the event loop, because it may change."""
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

    async def attempt(self, reader: OpenCheckpoint, leftovers: list[list[Any] | dict[Any, Any]]) -> Any:
        """Read one checkpoint.

        Args:
            reader: Of the checkpoint.
            leftovers: Gets what is large and not needed any more after that.
        """
        checkpoint = CheckpointReader(
            reader,
            self._workers,
            self._run,
            self._targets,
            verify=self._verify,
            progress=self._progressed,
            in_place=self._in_place,
        )
        # Headers only. Everything that can be refused is refused before tensors are read.
        outline = await checkpoint.open()
        names = await checkpoint.names(outline, self._selection, None if self._into is None else LEFT_OUT)
        leftovers += (*await self._workers.run(outline.containers), names)
        spread = await self._workers.run(
            partial(strided_layouts, outline.table, outline.records, outline.positions, path=checkpoint.manifest_path)
        )
        if self._into is None:
            return await self._read_anew(checkpoint, outline, names, spread, leftovers)
        if self._stateful:
            # load_state_dict needs complete states. Those that the objects have now may differ from the loaded ones.
            tree = await self._read_anew(checkpoint, outline, names, spread, leftovers)
            return await self._put(tree)
        # What the bytes of files cannot go straight into comes first, into memory of its own.
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
        # Live tensors that bytes of files go straight into; only with in_place.
        if placement.direct:
            await self._read_in_place(checkpoint, parts, placement.direct)
        else:
            await checkpoint.read(parts)
        with span("into"):
            await self._carry_out(transfer)
        return self._into

    async def empty(self, leftovers: list[list[Any] | dict[Any, Any]]) -> None:
        """Drop the contents of containers in a thread. A cancellation is delivered when that is done."""
        await finish(partial(self._workers.run, partial(empty_in_steps, leftovers)))

    async def _read_anew(
        self,
        checkpoint: CheckpointReader,
        outline: Outline,
        names: Mapping[str, bool],
        spread: Mapping[str, View],
        leftovers: list[list[Any] | dict[Any, Any]],
    ) -> Any:
        """Read into a new tree."""
        path = checkpoint.manifest_path
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
        # The memory may be what was freed on the caller's streams, which still use it.
        self._follow_the_caller(device for device in shares if device is not None and device.type != "meta")
        await checkpoint.read(parts)
        if of_sparse:
            await self._workers.run(partial(check_sparse, outline.table, outline.records, read, path))
            await self._bring({data[name]: read[name] for name in beside})
        tree, _ = await checkpoint.decode(outline, data, self._classes)
        return tree

    async def _bring(self, pairs: Mapping[torch.Tensor, torch.Tensor]) -> None:
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
        """Read what is needed to see what the tree is like; of other tensors there is the size only."""
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
        """Read into live tensors, and have PyTorch know before and after, which cannot see that they change."""

        async def count() -> None:
            await self._workers.run(partial(_count_changes, live))

        # Before the first byte: a staging that is under way must be torn even if this load fails half-way. And after
        # the last, for one that began in between.
        await count()
        try:
            await checkpoint.read(parts)
        except BaseException as error:
            error.add_note("Tensors of the live tree were being read into: some have new values, some old ones.")
            if isinstance(error, GeneratorExit):
                # It may not wait.
                _count_changes(live)
            else:
                await finish(count)
            raise
        await finish(count)

    async def _run(self, call: Callable[[], T]) -> T:
        """Run in a worker thread what makes tensors, or calls functions of the caller's, as if in the caller's."""
        return await self._workers.run(partial(self._as_caller, call))

    def _as_caller(self, call: Callable[[], T]) -> T:
        # A device that has failed matters only where something is on it, and there a copy to it says so.
        streams = nullcontext() if self._caller.failed else self._caller.entered()
        with self._caller.modes(), streams:
            return call()

    @property
    def _reads_everything(self) -> bool:
        return self._verify and self._selection is None

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
        # What was enqueued since the call as well: live tensors may be changed until they are read into.
        self._caller.renew()
        for device in devices:
            copier.follow_the_caller(device)
            # One that is in use, to register memory with: it may be the first.
            self._targets.device = self._targets.device or device

    async def _carry_out(self, transfer: Transfer) -> None:
        """Change the live tree. Shielded from cancellation: half a load would be a mixture of two states."""
        # The last look at the live tree. From here on it is changed, and nothing may break off between two of its
        # tensors.
        await self._workers.run(partial(transfer.check_live, cast=self._fit.cast))
        job = self._workers.job()
        for device, live, loaded in transfer.batches():
            job.put(partial(self._copy, device, live, loaded))
        job.close()
        await finish(partial(self._complete, transfer, job))

    def _copy(self, device: torch.device | None, live: list[torch.Tensor], loaded: list[torch.Tensor]) -> None:
        if device is not None and self._targets.copier is not None:
            # Cast here, since a device copies bytes.
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
        # Last, on the event loop: what is not a tensor changes in one step, when all tensors have their values.
        transfer.assign()


def _memory_for_sparse(
    outline: Outline, data: Mapping[str, torch.Tensor], path: str
) -> tuple[bool, dict[str, torch.Tensor]]:
    """Return whether there are tensors that sparse ones consist of, and host memory for those on devices. Blocks.

    Indices are looked at in host memory: on a device that would wait for all that it is given to do.
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
    """Count a change of tensors, by which a staging under way notices it."""
    for tensor in releasing_gil(live):
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


_logger = logging.getLogger("aiostage")

_ATTEMPTS = 10
"""Attempts to read a checkpoint that other processes replace meanwhile."""


def load(
    source: Target,
    *,
    into: Any = None,
    in_place: bool = False,
    strict: StrictOption = True,
    cast: bool = False,
    device: DeviceOption | None = None,
    only: Only | None = None,
    classes: Iterable[type] = (),
    verify: bool = True,
    progress: ProgressOption[LoadProgress] = None,
    backend: Backend | None = None,
) -> Coroutine[Any, Any, Any]:
    """Return a coroutine that reads a checkpoint.

    A plain function: copies to devices follow what the caller's current streams had been given at the call, and what
    these and the current streams are given once the coroutine has returned follows the copies.

    Args:
        source: Where :func:`save` has put it.
        into: A live tree to change in place: its tensors, of any device, take the loaded values, and what is not a
            tensor is put into its dicts and lists, and into objects that have tensors in them. Gradients and attributes
            of tensors are loaded where the checkpoint has them; others stay. None: return a new tree. It, or a value of
            it if it is a dict, may be an object with ``state_dict`` and ``load_state_dict`` (DCP's ``Stateful``, such
            as a module or an optimizer): its ``load_state_dict`` is called with what was saved, on the event loop and
            the streams of the call, when all else is done.
        in_place: Read straight into the tensors of ``into``, with 64 MiB of host memory or so, however large the
            checkpoint is. Should a file be damaged, or the load fail or be cancelled, ``into`` is then left with old
            and new values, and damaged ones perhaps. Not with Stateful objects.
        strict: Whether the checkpoint and ``into`` must have the same leaves. False: what is missing from the
            checkpoint stays as it is, what is unexpected is not loaded, and both are logged as a warning. A function
            is called with the paths that are missing and those that are unexpected instead, before anything is changed;
            what it raises ends the load. Shapes and kinds have to fit anyhow.
        cast: Let floating-point tensors take values of another floating-point dtype, rounded as ``Tensor.copy_``
            does: a checkpoint in float32 into parameters in bfloat16.
        device: Where the tensors of a new tree go, in place of host memory: a device or its name, for all; or a
            function that is called with the path of each tensor and with one on the meta device that is like it, and
            returns a device, or None for host memory. They are read straight there, through about 64 MiB of host
            memory, pinned where the accelerator supports that. On ``"meta"`` they have no elements, and nothing but
            headers is read.
        only: What to load: patterns with ``*`` and ``?`` of paths such as ``model.layers.0.weight``; or a function of a
            path that returns whether it is wanted. What is chosen is loaded with all that is below it. Functions for
            ``only`` and ``device`` may be called in a worker thread, with the caller's streams. Nothing
            else is read, or touched in ``into``; from a new tree it is missing, and None in lists and tuples.
        classes: Dataclasses, named tuples, enumerations, tensor subclasses and others of your own, whose objects are to
            come back as they were; a file names no code to run, so those of other classes come back as
            :class:`~aiostage.checkpoint.PlainObject`. What was passed to :func:`aiostage.checkpoint.register` or to
            ``torch.serialization.add_safe_globals`` counts as passed.
        verify: Compare every byte read with the checksums. Without, only the structure is checked.
        progress: True shows a progress bar (with tqdm). A function is called on the event loop as parts are read; what
            it raises ends the load.
        backend: How to reach devices; None is ``torch.accelerator``.

    Returns:
        A coroutine that returns the tree that was saved; or ``into``. Memory on devices is allocated for the streams
        that were current at the call.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint.
        CheckpointError: If it is of another program and needs code, or a class of ``classes`` does not fit.
        CheckpointCorruptError: If a file is missing, damaged, incomplete or foreign.
        CheckpointMismatchError: If the checkpoint does not fit ``into``, with every place where it does not. Nothing
            was changed then, nor read but headers. Also if a tensor or a container of ``into`` is replaced or resized
            before it gets its values.
        HostMemoryError: If memory for the tensors cannot be had.
        AcceleratorUnavailableError: If there is no accelerator for ``device``.
        torch.OutOfMemoryError: If a device has no room.
        StagingError: If a device has failed.
        TypeError: If an argument has the wrong type, or ``device`` returns what is not a device.
        ValueError: If ``only`` matches nothing, there is no ``into`` for ``in_place``, ``strict``
            or ``cast``, or ``device`` is not available: of
            tensors that share memory, each on another; sparse and quantized ones on the meta device.
        OSError: If the storage refuses.

    Unless ``in_place``, ``into`` is not changed before everything was read, verified and compared, for which the
    tensors are in host memory a second time. What a Stateful object raises
    comes after all else was changed. May be cancelled: either nothing of ``into`` has been changed then, or
    everything.
    """
    if into is not None or device is not None:
        backend = backend if backend is not None else default_backend()
        caller = CallerStreams.record(backend, into)
    else:
        caller = CallerStreams.record(None, None)
    reading = load_after(
        caller,
        source,
        into=into,
        in_place=in_place,
        strict=strict,
        cast=cast,
        device=device,
        only=only,
        classes=classes,
        verify=verify,
        progress=progress,
        backend=backend,
    )
    return named(reading, "load")


async def load_after(
    caller: CallerStreams,
    source: Target,
    *,
    into: Any = None,
    in_place: bool = False,
    strict: StrictOption = True,
    cast: bool = False,
    device: DeviceOption | None = None,
    only: Only | None = None,
    classes: Iterable[type] = (),
    verify: bool = True,
    progress: ProgressOption[LoadProgress] = None,
    backend: Backend | None = None,
    foreign: bool = True,
) -> Any:
    """Read a checkpoint for a caller whose streams were recorded at the call; the rest is as for :func:`load`.

    Without ``foreign``, one of another program will not do.
    """
    storage, name = locate(source)
    check_flags(in_place=in_place, verify=verify, cast=cast)
    if not isinstance(strict, bool) and not callable(strict):
        raise TypeError(f"strict must be True, False or a function of two lists of paths, not {shown(strict)}")
    if into is None and (cast or strict is not True):
        raise ValueError("strict= and cast= are for a live tree: pass into=")
    if in_place and stateful_in(into, is_value):
        raise ValueError("in_place=True reads into tensors, and into= has objects that take whole state dicts")
    if in_place and into is None:
        raise ValueError("in_place=True needs a live tree to load into: pass into=")
    if device is not None and into is not None:
        raise ValueError("device= is for a new tree; the tensors of into= stay on the devices that they are on")
    selection = Selection(only, f"{storage.location}/{name}") if only is not None else None
    known = Classes(classes, declared_safe())
    with span("load", source=name), reporting(progress, f"loading {name}") if progress else nullcontext() as report:
        reaches = into is not None or device is not None
        if reaches and backend is None:
            backend = default_backend()
        devices = Devices(device, backend)
        begin = perf_counter()
        async with Loading(
            into,
            selection,
            in_place,
            verify,
            devices,
            backend if reaches else None,
            known,
            caller,
            name=name,
            report=report,
            fit=Fit(strict=strict, cast=cast, name=name),
        ) as loading:
            for _ in range(_ATTEMPTS):
                try:
                    reader = await open_checkpoint(storage, name)
                except CheckpointNotFoundError:
                    read = await loading.recognize(storage, name) if foreign else None
                    if read is None:
                        raise
                    if device is not None:
                        raise ValueError(
                            f"device= is for checkpoints of aiostage, and {shown(name)} is none; "
                            "pass into=, or convert it"
                        ) from None
                    return await loading.adopt(read)
                try:
                    # What is large is to end in a thread, and not here with the variables of coroutines.
                    leftovers: list[list[Any] | dict[Any, Any]] = []
                    tree = await loading.attempt(reader, leftovers)
                    await loading.empty(leftovers)
                    _logger.info("loaded %s in %.3f s", reader.location, perf_counter() - begin)
                    return tree
                except CheckpointNotFoundError:
                    if await is_removed(storage, name):
                        raise
                    # Replaced while it was read; if it was deleted, the next attempt says so.
                    continue
                finally:
                    await reader.aclose()
    raise CheckpointError("another process replaced it during each attempt to read it.", path=name)
