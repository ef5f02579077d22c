"""The stager for programs without an event loop."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

from aiostage.abc import Backend
from aiostage.blocking.background import Background, OnBackground
from aiostage.errors import StagerClosedError, StagingError
from aiostage.leaf import Path
from aiostage.options import StagerStatistics, StagingOptions
from aiostage.sharing import SharedTree
from aiostage.snapshot import Snapshot as AsyncSnapshot
from aiostage.stager import AsyncStager

__all__ = ["Snapshot", "Stager"]

T = TypeVar("T")


class Stager(OnBackground):
    """An :class:`aiostage.AsyncStager` whose methods block their caller only.

    Copies are made by an event loop in a background thread, and that loop's workers. Enter it with ``with``. Several
    threads may use it.

    Args:
        options: As for :class:`aiostage.AsyncStager`.
        backend: As for :class:`aiostage.AsyncStager`.

    Raises:
        AcceleratorUnavailableError: As for :class:`aiostage.AsyncStager`.
        TypeError: As for :class:`aiostage.AsyncStager`.
    """

    def __init__(self, options: StagingOptions | None = None, *, backend: Backend | None = None) -> None:
        super().__init__()
        self.stager = AsyncStager(options, backend=backend)

    def __repr__(self) -> str:
        return f"<blocking {self.stager!r}>"

    def prewarm(self, state_dict: object) -> None:
        """Do now what the first staging would have to do, as :meth:`aiostage.AsyncStager.prewarm` does."""
        background = self.background()
        background.wait(self.stager.prewarm(state_dict))

    def stage(self, state_dict: T) -> T:
        """Return a staged copy, captured.

        Args:
            state_dict: As for :meth:`aiostage.AsyncStager.stage`.

        Returns:
            The same tree over tensors in host memory.

        Raises:
            Exception: As :meth:`aiostage.AsyncStager.stage` does.
        """
        background = self.background()
        # Called in this thread: the copies follow what was enqueued on its current streams.
        return background.wait(self.stager.stage(state_dict))

    def snapshot(self, state_dict: T, *, streamed: bool = False) -> Snapshot[T]:
        """Return a staging with a handle on it, to be entered with ``with``; :meth:`aiostage.AsyncStager.snapshot`."""
        background = self.background()
        return Snapshot(background, self.stager.snapshot(state_dict, streamed=streamed))

    def restore(self, staged: T, into: T) -> None:
        """Copy staged values back into live tensors, in place.

        Args:
            staged: As for :meth:`aiostage.AsyncStager.restore`.
            into: As for :meth:`aiostage.AsyncStager.restore`.

        Raises:
            Exception: As :meth:`aiostage.AsyncStager.restore` does.
        """
        background = self.background()
        background.wait(self.stager.restore(staged, into))

    def share(self, staged: object) -> SharedTree:
        """Describe a staged tree, so that another process can open it; as :meth:`aiostage.AsyncStager.share`."""
        background = self.background()
        return background.wait(self.stager.share(staged))

    def statistics(self) -> StagerStatistics:
        """Return what the stager has done and what it holds now."""
        return self.stager.statistics()

    def background(self) -> Background:
        """Return the event loop that it runs on.

        Raises:
            StagingError: If it was not entered.
            StagerClosedError: If it was left.
            CheckpointError: If this is a forked child.
        """
        if self._background is None:
            raise StagingError("the stager was not entered.", remedy="Use it inside its `with` block.")
        self._background.check()
        if self._exit is None:
            raise StagerClosedError
        return self._background

    def __enter__(self) -> Stager:
        """Start the background thread.

        Raises:
            StagingError: If it was entered before.
        """
        if self._background is not None:
            raise StagingError("the stager was entered before.", remedy="Make a new Stager for another block.")
        with self._starting(self.stager, None, "aiostage-stager"):
            return self


class Snapshot(Generic[T]):
    """One staging under way, whose methods block. Made by :meth:`Stager.snapshot`; enter it to begin.

    It may be saved to several targets, with :func:`aiostage.blocking.save` and with checkpointers that were made with
    its stager, and is copied once.
    """

    def __init__(self, background: Background, snapshot: AsyncSnapshot[T]) -> None:
        self._background = background
        self._snapshot = snapshot
        self._exit: AbstractContextManager[object] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the staged copy in bytes; 0 until the snapshot is entered."""
        return self._snapshot.nbytes

    @property
    def leaves(self) -> int:
        """How many leaves the state dict has; 0 until the snapshot is entered."""
        return self._snapshot.leaves

    @property
    def is_captured(self) -> bool:
        """Whether the source may be changed."""
        return self._snapshot.is_captured

    def captured(self) -> None:
        """Block until the source may be changed, as :meth:`aiostage.Snapshot.captured` does."""
        self._background.call(self._snapshot.captured)

    def result(self) -> T:
        """Block until captured and return the staged tree, as :meth:`aiostage.Snapshot.result` does."""
        return self._background.call(self._snapshot.result)

    def source_free(self, path_prefix: Path = ()) -> None:
        """Block until a part of the source has been copied, as :meth:`aiostage.Snapshot.source_free` does."""
        self._background.call(self._snapshot.source_free, path_prefix)

    def on(self, background: Background | None) -> AsyncSnapshot[T]:
        """Return what is to be saved on an event loop; None is its own.

        Raises:
            StagingError: If it belongs to another loop.
        """
        if background is not None and background is not self._background:
            raise StagingError(
                "the snapshot is not of the checkpointer's own stager.",
                remedy="Make both checkpointer and snapshot with one stager: Checkpointer(target, stager).",
            )
        return self._snapshot

    def wait(self, coroutine: Any) -> Any:
        """Run a coroutine on the event loop of the snapshot, and block until it has ended."""
        return self._background.wait(coroutine)

    def __enter__(self) -> Snapshot[T]:
        """Walk the state dict, get memory and start the copies.

        Raises:
            Exception: As entering :class:`aiostage.Snapshot` does.
        """
        entered = self._background.wrap(self._snapshot)
        entered.__enter__()
        # After it was entered: a block that could not be entered must not be left.
        self._exit = entered
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release everything; a staging that is not captured is abandoned."""
        entered, self._exit = self._exit, None
        if entered is not None:
            entered.__exit__(kind, error, traceback)
