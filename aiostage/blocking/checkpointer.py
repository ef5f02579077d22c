"""The checkpointer for programs without an event loop: the same one, on an event loop in a background thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from aiostage.abc import CheckpointStager
from aiostage.blocking.background import Background, OnBackground
from aiostage.blocking.stager import Snapshot, Stager
from aiostage.checkpoint.checkpointer import Checkpointer as AsyncCheckpointer
from aiostage.checkpoint.preemption import Handlers, catchable
from aiostage.checkpoint.progress import ProgressOption, SaveProgress
from aiostage.checkpoint.save_task import SaveHandle as AsyncSaveHandle
from aiostage.checkpoint.writer import DEFAULT_SHARD_BYTES, CheckpointInfo
from aiostage.errors import CheckpointError
from aiostage.storage.locate import Root

__all__ = ["Checkpointer", "SaveHandle"]


class SaveHandle:
    """A captured checkpoint that is being written. Made by :meth:`Checkpointer.save`."""

    def __init__(self, background: Background, handle: AsyncSaveHandle) -> None:
        self._background = background
        self._handle = handle

    def __repr__(self) -> str:
        return repr(self._handle)

    @property
    def step(self) -> int:
        """The step that was saved."""
        return self._handle.step

    def done(self) -> bool:
        """Return whether it is committed, or has failed."""
        return self._handle.done()

    def committed(self) -> CheckpointInfo:
        """Block until the checkpoint is complete and safe in its storage.

        Returns:
            What was saved.

        Raises:
            Exception: As :meth:`aiostage.SaveHandle.committed` does.
        """
        # Without a lock, although the event loop's thread changes it: what is done stays done.
        if self._handle.done():
            # Not through the background, which may have ended since.
            return self._handle.outcome()
        return self._background.call(self._handle.committed)


class Checkpointer(OnBackground):
    """An :class:`aiostage.Checkpointer` that blocks its caller only until a checkpoint is captured.

    For trainers without an event loop: Lightning, Hugging Face's Trainer, a plain loop. Copies, digests and writes
    happen on an event loop in a background thread, and in that loop's workers. Enter it with ``with``. Leaving waits
    for saves that are running, and raises the errors that no caller has received. Several threads may use it.

    Args:
        target: As for :class:`aiostage.Checkpointer`.
        stager: Takes the copies: a :class:`Stager` that was entered and stays so, whose background thread is then used
            too; or one of the asynchronous ones. None: one is made for the block.
        keep: As for :class:`aiostage.Checkpointer`.
        keep_also: As for :class:`aiostage.Checkpointer`; called in the background thread.
        max_in_flight: As for :class:`aiostage.Checkpointer`.
        incremental: As for :class:`aiostage.Checkpointer`.
        max_shard_bytes: As for :func:`aiostage.save`.
        duplicate_tied: As for :func:`aiostage.save`.
        progress: As for :class:`aiostage.Checkpointer`; called in the background thread.
        save_on_signals: Signals, say ``signal.SIGTERM``, that set :attr:`preempted` instead of ending the process.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        target: Root,
        stager: Stager | CheckpointStager | None = None,
        *,
        keep: int | None = None,
        keep_also: Callable[[int], bool] | None = None,
        max_in_flight: int = 1,
        incremental: bool = False,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        duplicate_tied: bool = False,
        progress: ProgressOption[SaveProgress] = None,
        save_on_signals: Sequence[signal.Signals] = (),
    ) -> None:
        super().__init__()
        self._stager = stager if isinstance(stager, Stager) else None
        self._checkpointer = AsyncCheckpointer(
            target,
            stager.stager if isinstance(stager, Stager) else stager,
            keep=keep,
            keep_also=keep_also,
            max_in_flight=max_in_flight,
            incremental=incremental,
            max_shard_bytes=max_shard_bytes,
            duplicate_tied=duplicate_tied,
            progress=progress,
        )
        self._signals = catchable(save_on_signals)
        self._preempted = threading.Event()

    def __repr__(self) -> str:
        return f"<blocking {self._checkpointer!r}>"

    @property
    def preempted(self) -> threading.Event:
        """Set when the process has to end soon: by one of ``save_on_signals``, or by you.

        The trainer looks at it between two steps, saves a last time and leaves the block, which waits for the commit.
        """
        return self._preempted

    def save(self, step: int, state_dict: Any, *, replace: bool = False) -> SaveHandle:
        """Capture a checkpoint, and leave the writing to the background.

        Args:
            step: The step, from 0. There must be no checkpoint of it yet, unless it may be replaced.
            state_dict: A tree as for :func:`aiostage.save`, which may change once this returns; or an entered
                :class:`Snapshot` of the checkpointer's own ``stager``, which is not copied again.
            replace: As for :meth:`aiostage.Checkpointer.save`.

        Returns:
            A handle on the rest.

        Raises:
            Exception: As :meth:`aiostage.Checkpointer.save` does.
        """
        background = self._entered()
        if isinstance(state_dict, Snapshot):
            state_dict = state_dict.on(background)
        # Called in this thread: the copies follow what was enqueued on its current streams.
        capture = self._checkpointer.save(step, state_dict, replace=replace)
        return SaveHandle(background, background.call(lambda: capture))

    def steps(self) -> list[int]:
        """Return the steps of all committed checkpoints, in ascending order."""
        return self._entered().call(self._checkpointer.steps)

    def latest(self) -> int | None:
        """Return the highest step that there is a checkpoint of, or None if there is none."""
        return self._entered().call(self._checkpointer.latest)

    def restore(self, into: Any = None, step: int | None = None, **options: Any) -> Any:
        """Read a checkpoint.

        Args:
            into: A live tree to change in place. None: return a new tree.
            step: The step. None: the latest.
            **options: More that :func:`aiostage.load` takes, such as ``device``. Functions are called in the background
                thread.

        Returns:
            The tree that was saved; or ``into``.

        Raises:
            Exception: As :meth:`aiostage.Checkpointer.restore` does.
        """
        background = self._entered()
        # Called in this thread, as in save().
        restoring = self._checkpointer.restore(into, step, **options)
        return background.call(lambda: restoring)

    def delete(self, step: int) -> None:
        """Remove a checkpoint. A missing one is not an error.

        Raises:
            OSError: If the storage refuses.
        """
        self._entered().call(self._checkpointer.delete, step)

    def __enter__(self) -> Checkpointer:
        """Start the background thread, and remove what writers that died have left behind.

        Raises:
            CheckpointError: If it was entered before.
            ValueError: If it is to receive signals and this is not the main thread.
            OSError: If the storage refuses.
        """
        background = self._stager.background() if self._stager is not None else None
        with self._starting(self._checkpointer, background, "aiostage-checkpointer") as stack:
            # The old handlers are recorded and their return is arranged first, so that an error in the loop leaves none
            # of ours behind. Python sets handlers in the main thread only, so this is not done in the background.
            stack.callback(Handlers(self._signals).put_back)
            for number in self._signals:
                signal.signal(number, self._preempt)
        return self

    def _preempt(self, number: int, frame: FrameType | None) -> None:
        self._preempted.set()

    def _entered(self) -> Background:
        if self._background is not None:
            self._background.check()
        if self._background is None or self._exit is None:
            raise CheckpointError(
                "the checkpointer was not entered, or was left.", remedy="Use it inside its `with` block."
            )
        return self._background
