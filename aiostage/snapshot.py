"""A staging with a handle on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Generic, TypeVar

from aiostage._arguments import checked_path
from aiostage._copy.phases import Timings
from aiostage._copy.resources import Resources
from aiostage._copy.staging import Staging, State
from aiostage._copy.window import Window
from aiostage.errors import HostMemoryError, StagingError
from aiostage.leaf import Path, StagedLeaf

__all__ = ["Snapshot"]

T = TypeVar("T")


class Snapshot(Generic[T]):
    """One staging under way. Made by :meth:`AsyncStager.snapshot`; enter it to begin.

    Entering walks the state dict and starts the copies; they run on while the block does other things. Leaving the
    block before :meth:`captured` has returned abandons the staging. Afterwards it only drops the references: the staged
    tree lives for as long as the caller refers to its :meth:`result`. Several tasks may wait for one snapshot.
    """

    def __init__(self, resources: Resources, source: T, *, streamed: bool = False) -> None:
        self._staging = Staging(resources, source, streamed=streamed)

    @property
    def nbytes(self) -> int:
        """Size of the staged copy in bytes; 0 until the snapshot is entered."""
        return self._staging.nbytes

    @property
    def leaves(self) -> int:
        """How many leaves the state dict has; 0 until the snapshot is entered."""
        return self._staging.leaves

    @property
    def is_captured(self) -> bool:
        """Whether the source may be changed."""
        return self._staging.state is State.CAPTURED

    @property
    def timings(self) -> Timings:
        """Where the time went so far, in seconds for each phase."""
        return self._staging.timings

    async def captured(self) -> None:
        """Wait until the source may be changed without changing the staged copy.

        Raises:
            TornSnapshotError: If the source changed on the way.
            StagerClosedError: If the stager was closed on the way.
            StagingError: If the snapshot was not entered, or was left or cancelled before.

        May be cancelled; the staging is then abandoned unless another task waits for it too.
        """
        await self._complete()

    async def result(self) -> T:
        """Wait until captured and return the staged tree.

        Returns:
            The state dict over staged tensors, in host memory.

        Raises:
            TornSnapshotError: If the source changed on the way.
            StagerClosedError: If the stager was closed on the way.
            StagingError: If the snapshot was not entered, or was left or cancelled before.
            HostMemoryError: If it is streamed, and its bytes only pass through memory.

        May be cancelled; the staging is then abandoned unless another task waits for it too.
        """
        self._check_whole()
        return await self._complete()

    async def source_free(self, path_prefix: Path = ()) -> None:
        """Wait until a part of the source has been copied, before the rest has.

        Args:
            path_prefix: Keys, indices and attribute names that lead to the part; the empty path is everything.

        Raises:
            TypeError: If it is no path.
            KeyError: If there is no such part with tensors in it.
            StagerClosedError: If the stager was closed on the way.
            StagingError: If the snapshot was not entered, or was left or abandoned before; or if the device
                has failed.

        May be cancelled; that changes nothing. Whether that part was left alone until now is known when the snapshot
        is captured.
        """
        self._check_entered()
        if self.is_captured:
            return
        # It will not be free by a copy: completing raises why.
        if not await self._staging.parts_free([checked_path("path_prefix", path_prefix)]):
            await self._complete()

    @property
    def memory(self) -> range:
        """The addresses of the staged memory; empty until the snapshot is entered."""
        return self._staging.progress.memory

    @property
    def window(self) -> Window | None:
        """What the bytes pass through if they do not fit ``max_host_bytes``; the addresses then have no memory."""
        return self._staging.progress.window

    async def fill(self) -> None:
        """Copy through the window, if there is one, as its consumer makes room; returns when all is under way.

        Raises:
            HostMemoryError: If memory cannot be had.
            StagerClosedError: If the stager was closed on the way.

        May be cancelled; the staging is then abandoned.
        """
        if self._staging.state is State.COPYING:
            await self._staging.fill()

    async def outline(self) -> T:
        """Return the staged tree, whose tensors may not have their values yet; for writers that use :meth:`copied`.

        Raises:
            Exception: The errors of :meth:`result`.

        Waits for the capture only if the tree cannot be made without looking at values.
        """
        if not self.is_captured:
            self._check_entered()
            # One that cannot be built early is waited for: its objects look at values.
            if await self._staging.build_early():
                return self._staging.tree  # type: ignore[no-any-return]
        return await self._complete()

    async def copied(self, address: int, nbytes: int) -> None:
        """Wait until bytes of the staged memory have their final values; for addresses elsewhere, do not wait.

        Args:
            address: The address of the first byte.
            nbytes: How many.

        Raises:
            Exception: The errors of :meth:`result`, except that a change of the source is noticed at capture only.

        May be cancelled; that changes nothing.
        """
        if not self.is_captured:
            self._check_entered()
            if not await self._staging.progress.bytes(address, nbytes):
                await self._complete()

    def order_before(self, stream: Any | None = None, *, parts: Iterable[Path] | None = None) -> None:
        """Make later work on a device wait there for the copies, so that the caller need not wait.

        After this call the source may be changed by work on that stream. Changes made before it still are noticed as
        torn, later ones are none. Looks at every leaf at once, for about 0.3 microseconds each, and with ``parts`` for
        about 2.

        Args:
            stream: A stream of the accelerator; None is the current stream of each device that is being copied from.
            parts: Paths that lead to what is about to be changed, to wait for its copies only: for buffers, say, that
                the forward pass changes, before the rest is ordered before the optimizer's step. What is small, up to
                64 KiB a leaf, is copied first. None is everything.

        Raises:
            TypeError: If the parts are not several paths.
            KeyError: If there are no tensors in one of the parts.
            StagingError: If tensors in host memory are still being copied, which no stream can wait for; or if the
                snapshot was not entered or was left before.
        """
        self._check_entered()
        if not self.is_captured:
            self._staging.order_before(
                stream,
                None if parts is None else [checked_path("parts", path) for path in checked_path("parts", parts)],
            )

    async def __aiter__(self) -> AsyncIterator[StagedLeaf]:
        """Yield each leaf as it is copied, with the first path that leads to it.

        A leaf that is yielded is final as a copy; whether the source was left alone meanwhile is known when the
        iteration ends, which is when the snapshot is captured.

        Raises:
            TornSnapshotError: At the end, if the source changed on the way.
        """
        self._check_entered()
        self._check_whole()
        staging = self._staging
        for number, batch in staging.in_order():
            if not self.is_captured and not await staging.progress.batch(number):
                # Failed, abandoned or closed: completing says which.
                break
            # No leaf is in a local: the traceback of a cancellation would keep it.
            for index in staging.leaves_of(batch):
                yield staging.leaf(index)
        await self._complete()
        for index in staging.leaves_of(None):
            yield staging.leaf(index)

    async def __aenter__(self) -> Snapshot[T]:
        """Walk the state dict, get memory and start the copies.

        Raises:
            UnsupportedLeafError: If a leaf cannot be staged faithfully; nothing was copied.
            HostMemoryError: If memory cannot be had.
            StagerClosedError: If the stager is closed.

        May be cancelled; nothing is then left behind.
        """
        if self._staging.state is not State.NEW:
            raise StagingError("the snapshot was entered before.", remedy="Call snapshot() again for another one.")
        await self._staging.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Drop the staged tree, or abandon the staging if it is not captured and wait for the copies that run."""
        await self._staging.drop(error)

    def _check_whole(self) -> None:
        if self._staging.progress.window is not None:
            raise HostMemoryError(
                f"the {self.nbytes} bytes of the copy only pass through memory, for max_host_bytes would not hold two.",
                remedy="Give the snapshot to save(), or make it without streamed=True.",
            )

    def _check_entered(self) -> None:
        state, failure = self._staging.state, self._staging.failure
        if state in (State.NEW, State.NOTING):
            raise StagingError("the snapshot was not entered.", remedy="Use `async with stager.snapshot(...)`.")
        if failure is not None:
            raise failure
        if state in (State.FAILED, State.DROPPED):
            raise StagingError(
                "the snapshot's context was exited, or the snapshot was abandoned before it was captured.",
                remedy="Await captured() and result() inside the `async with` block.",
            )

    async def _complete(self) -> T:
        self._check_entered()
        return await self._staging.complete()  # type: ignore[no-any-return]
