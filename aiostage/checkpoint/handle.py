"""A save that goes on by itself, and what became of it."""

from __future__ import annotations

import anyio

from aiostage.checkpoint.info import CheckpointInfo

__all__ = ["SaveHandle"]


class SaveHandle:
    """A captured checkpoint on its way into its storage. Made by :meth:`Checkpointer.save`.

    Dropping it stops nothing. An error that was not asked for by :meth:`committed` is raised by the next
    :meth:`Checkpointer.save`, or when the checkpointer's block is left.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._ended = anyio.Event()
        self._info: CheckpointInfo | None = None
        self._error: Exception | None = None
        self._told = False
        self._waiting = 0

    def __repr__(self) -> str:
        state = "under way" if not self.done() else "committed" if self._error is None else f"failed: {self._error}"
        return f"<SaveHandle of step {self._step}, {state}>"

    @property
    def step(self) -> int:
        """The step that was saved."""
        return self._step

    def done(self) -> bool:
        """Return whether it is committed, or has failed."""
        return self._ended.is_set()

    async def committed(self) -> CheckpointInfo:
        """Wait until the checkpoint is complete and safe in its storage.

        Returns:
            What was saved.

        Raises:
            CheckpointExistsError: If another writer has saved this step since the checkpointer's block was entered.
            CheckpointError: If the save was abandoned because the checkpointer's block was cancelled.
            OSError: If the storage refuses.
            StagingError: Whatever else :func:`save` raises.

        Several tasks may wait. May be cancelled; the save goes on.
        """
        self._waiting += 1
        try:
            await self.ended()
        finally:
            self._waiting -= 1
        return self.outcome()

    def outcome(self) -> CheckpointInfo:
        """Return what was saved, or raise its error, without waiting.

        Raises:
            RuntimeError: If it is still under way; look at :meth:`done`.
            Exception: As :meth:`committed` does.
        """
        error = self.take_error() if self.done() else None
        if error is not None:
            try:
                raise error
            finally:
                # The traceback now has this frame in it, which must not lead back to the error.
                del error
        if self._info is None:
            raise RuntimeError(f"the save of step {self._step} is still under way; await committed()")
        return self._info

    async def ended(self) -> None:
        """Wait until it is committed or has failed, without being told which. Cancelling changes nothing."""
        await self._ended.wait()

    def end(self, outcome: CheckpointInfo | Exception) -> None:
        """Say what became of it. Called once, by the checkpointer."""
        if isinstance(outcome, Exception):
            self._error = outcome
        else:
            self._info = outcome
        self._ended.set()

    @property
    def error(self) -> Exception | None:
        """Its error, if it has failed and no task has been told or waits to be."""
        return None if self._told or self._waiting else self._error

    def take_error(self) -> Exception | None:
        """Return its error, and count it as reported to the caller."""
        self._told = True
        return self._error
