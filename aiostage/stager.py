"""The stager: what users hold, and the adapter for PyTorch's own."""

from __future__ import annotations

from collections.abc import Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from aiostage._arguments import check_flags
from aiostage._copy.resources import Resources
from aiostage._copy.restore import restore
from aiostage._copy.staging import Staging, State
from aiostage._device import CallerStreams, checked_backend, default_backend
from aiostage._loop.coroutines import finish, named
from aiostage._loop.polling import wait_event
from aiostage._loop.workers import Workers, all_settled
from aiostage.abc import Backend, CheckpointStager
from aiostage.errors import AcceleratorUnavailableError, StagerClosedError, shown
from aiostage.options import StagerStatistics, StagingOptions
from aiostage.sharing import SharedTree, share
from aiostage.snapshot import Snapshot

__all__ = ["AsyncStager", "adapt", "check_stager"]

T = TypeVar("T")


class AsyncStager(CheckpointStager):
    """Stages state dicts as coroutines: training-safe deep copies in host memory, made beside a running event loop.

    Entering does nothing that needs undoing and may happen in another task than leaving; leaving closes. Many tasks
    may stage at once, each gets its own copy. A stager may serve several event loops, one after the other or from
    several threads. One that has staged and is dropped without having been closed warns of that (ResourceWarning), and
    a thread gives its memory back.

    Args:
        options: How to stage; the defaults fit the machine.
        backend: How to reach accelerators; None is ``torch.accelerator``.

    Raises:
        AcceleratorUnavailableError: If an option demands what this machine does not have.
        TypeError: If the options are not :class:`StagingOptions`, or the backend is no :class:`~aiostage.Backend`.
    """

    def __init__(self, options: StagingOptions | None = None, *, backend: Backend | None = None) -> None:
        if options is not None and not isinstance(options, StagingOptions):
            raise TypeError(
                f"options must be aiostage.StagingOptions, not {shown(options)}. "
                "StagingOptions.from_torch() takes over those of PyTorch's stagers."
            )
        self._options = options if options is not None else StagingOptions()
        backend = checked_backend(backend)
        _check_available(self._options, backend)
        self._resources = Resources(self._options, backend if backend.unavailable_reason is None else None)

    def __repr__(self) -> str:
        """Show the options, and what is held now."""
        state = "closed" if self._resources.closing.closed else f"{self.statistics().leases} leases"
        return f"<AsyncStager {state} {self._options}>"

    @property
    def options(self) -> StagingOptions:
        """How it stages."""
        return self._options

    def prewarm(self, state_dict: object) -> Coroutine[Any, Any, None]:
        """Return a coroutine that does what the first staging would have to do: allocate, fault in and pin.

        Args:
            state_dict: Like the ones to come.

        Raises:
            Exception: The errors of :meth:`stage`.

        May be cancelled; nothing is then left behind.
        """
        staging = self.stage(state_dict)
        return named(_prewarm(staging), "AsyncStager.prewarm", staging)

    def stage(self, state_dict: T) -> Coroutine[Any, Any, T]:
        """Return a coroutine that returns a staged copy, captured.

        A plain function: the caller's moment is that of the call, also if the coroutine is started later by a task.

        Args:
            state_dict: Any deep-copyable tree with tensors in it.

        Returns:
            A coroutine that returns the same tree over tensors in host memory, detached from autograd.

        Raises:
            UnsupportedLeafError: If a leaf cannot be staged faithfully; nothing was copied.
            TornSnapshotError: If the source changed before it was captured.
            HostMemoryError: If memory cannot be had.
            StagerClosedError: If the stager is closed, at the call or while it runs.

        The coroutine may be cancelled at any await: the copies that run are waited for, nothing stays behind, and the
        stager works on.
        """
        self._resources.closing.check()
        return named(_stage(Staging(self._resources, state_dict)), "AsyncStager.stage")

    def snapshot(self, state_dict: T, *, streamed: bool = False) -> Snapshot[T]:
        """Return a staging with a handle on it, to be entered with ``async with``.

        Args:
            state_dict: Any deep-copyable tree with tensors in it.
            streamed: Let the copy be larger than ``max_host_bytes``. If two of it would not fit, it passes through
                that much memory on its way to the one :func:`save` that the snapshot is given to; it is captured when
                its last byte has been copied, which waits for the storage, and has no :meth:`Snapshot.result`.

        Raises:
            StagerClosedError: If the stager is closed.
            TypeError: If ``streamed`` is not a bool.
        """
        check_flags(streamed=streamed)
        self._resources.closing.check()
        return Snapshot(self._resources, state_dict, streamed=streamed)

    def restore(self, staged: T, into: T) -> Coroutine[Any, Any, None]:
        """Return a coroutine that copies staged values back into live tensors, in place.

        A plain function: the copies follow what the caller's current streams had been given at the call, and what they
        are given once the coroutine has returned follows the copies.

        Args:
            staged: A staged tree. Tensors of it that are on a device, as ``passthrough`` leaves them, are brought to
                host memory first.
            into: A tree of the same structure, whose tensors are overwritten; what is not a tensor is left alone.

        Raises:
            CheckpointMismatchError: If the two trees differ in paths, shapes or dtypes, or a live tensor cannot be
                written to; nothing was changed.
            HostMemoryError: If there is no memory for values that are on a device; nothing was changed.
            StagerClosedError: If the stager is closed. Once the copies have begun it is only the waiting that ends so:
                they are made all the same, before what the caller's stream is given next.
            StagingError: If a device has failed.

        May be cancelled: before the first copy nothing is changed; afterwards the copies are finished first, so that
        live tensors are never half restored.
        """
        self._resources.closing.check()
        caller = CallerStreams.record(self._resources.backend, (into, staged))
        return named(restore(self._resources, caller, staged, into), "AsyncStager.restore")

    async def share(self, staged: object) -> SharedTree:
        """Describe a staged tree, so that another process can open it without copying it.

        Args:
            staged: What a staging of this stager with ``use_shared_memory=True`` has returned.

        Returns:
            A small picklable handle; ``handle.open()`` in the other process returns the tree. It is good while the
            staged tree is referred to here.

        Raises:
            StagingError: If no tensor of it is in this stager's shared memory, or something in it cannot be pickled.
            StagerClosedError: If the stager is closed.

        May be cancelled; nothing is then left behind.
        """
        self._resources.closing.check()
        arenas = self._resources.pool.leased()
        return await self._resources.workers.run(partial(share, staged, arenas))

    def statistics(self) -> StagerStatistics:
        """Return what the stager has done and what it holds now."""
        resources = self._resources
        counts, plans, pool = resources.counts, resources.plans, resources.pool.statistics()
        return StagerStatistics(
            stagings=counts.stagings,
            leaves=counts.leaves,
            nbytes=counts.nbytes,
            plans_compiled=plans.compiled,
            plans_replayed=plans.replayed,
            copies=counts.copies,
            launches=counts.launches,
            arenas=pool.arenas,
            leases=pool.leases,
            waiting=pool.waiting,
            pageable_bytes=pool.pageable_bytes,
            shared_bytes=pool.shared_bytes,
            pinned_bytes=pool.pinned_bytes,
            longest_loop_hold=counts.longest_loop_hold,
            longest_loop_hold_elapsed=counts.longest_loop_hold_elapsed,
        )

    async def aclose(self) -> None:
        """Close: stagings under way end with StagerClosedError, free memory is given back, the rest as leases end.

        Idempotent. When cancelled it closes all the same and then is cancelled. Staged trees stay valid. It waits for
        copies that threads are making, and not for devices: they may have failed, and what they were told to copy keeps
        its memory until it is done.
        """
        resources = self._resources
        resources.closing.close()
        resources.pool.close()
        jobs = tuple(resources.running)
        for job in jobs:
            job.cancel()
        try:
            await all_settled(jobs)
        finally:
            resources.stop()


def _check_available(options: StagingOptions, backend: Backend) -> None:
    """Refuse options that cannot be met, with the reason."""
    missing = backend.unavailable_reason
    no_pinning = missing or backend.pinned_memory_reason
    for name, reason in (("use_pinned_memory", no_pinning), ("use_non_blocking_copy", missing)):
        if getattr(options, name) and reason is not None:
            raise AcceleratorUnavailableError(
                f"{name}=True cannot be met: {reason}.",
                remedy=f"Set {name}=None to use it where it is available, or False.",
            )


async def _stage(staging: Staging) -> Any:
    try:
        await staging.start()
        return await staging.complete()
    except BaseException:
        # No other waiter asks for the error, and its traceback leads to this.
        staging.move(State.DROPPED)
        raise


async def _prewarm(staging: Coroutine[Any, Any, object]) -> None:
    await staging


class _Adapted(CheckpointStager):
    """A synchronous stager behind the coroutine interface."""

    def __init__(self, stager: Any) -> None:
        self._stager = stager
        # One thread, because PyTorch's stagers are not safe to call from two.
        self._workers = Workers(1, "aiostage-adapted")
        self._backend = default_backend()
        self._closed = False

    def stage(self, state_dict: T) -> Coroutine[Any, Any, T]:
        if self._closed:
            raise StagerClosedError
        caller = CallerStreams.record(self._backend, state_dict)
        return named(self._run(caller, state_dict), "CheckpointStager.stage")

    async def _run(self, caller: CallerStreams, state_dict: T) -> T:
        # Some stagers copy in a thread of their own, on streams that wait for nothing.
        for events in caller.events.values():
            for event in events:
                await wait_event(event)
        if self._closed:
            raise StagerClosedError
        return await self._workers.run(partial(self._stage, caller, state_dict))

    def _stage(self, caller: CallerStreams, state_dict: T) -> T:
        with caller.entered():
            staged: T | Future[T] = self._stager.stage(state_dict)
            return staged.result() if isinstance(staged, Future) else staged

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        close = getattr(self._stager, "close", None)
        if close is not None:
            await finish(partial(self._workers.run, close))
        self._workers.stop()


def adapt(stager: Any) -> CheckpointStager:
    """Give a synchronous PyTorch stager the coroutine interface.

    Args:
        stager: Something with ``stage(state_dict)`` that returns a state dict or a ``concurrent.futures.Future`` of
            one, and perhaps ``close()``: PyTorch's ``DefaultStager``, ``BlockingAsyncStager`` and kin. It runs in one
            worker thread, one call at a time, on the device and the streams that are current at the call, once what
            these were given before has been done; it is closed with the adapter.

    Returns:
        A :class:`CheckpointStager`. Its copies have the stager's own guarantees: most overwrite the previous result.
        A cancelled ``stage`` waits for the stager to finish first.

    Raises:
        TypeError: If the object has no ``stage`` method, or is a :class:`CheckpointStager` already.
    """
    if isinstance(stager, CheckpointStager):
        raise TypeError(
            f"adapt takes a synchronous stager; {shown(stager)} is asynchronous already, so use it as it is"
        )
    if isinstance(stager, type):
        raise TypeError(f"adapt takes a stager, not its class {stager.__qualname__}")
    if not callable(getattr(stager, "stage", None)):
        raise TypeError(f"adapt takes an object with a stage() method, not {type(stager).__qualname__}")
    return _Adapted(stager)


def check_stager(stager: object) -> None:
    """Check what was given as ``stager=``.

    Raises:
        TypeError: If it is neither a :class:`CheckpointStager` nor None.
    """
    if stager is not None and not isinstance(stager, CheckpointStager):
        raise TypeError(
            f"stager must be a CheckpointStager such as AsyncStager, or None, not {shown(stager)}. "
            "aiostage.adapt() makes one of PyTorch's stagers."
        )
