"""Our staging for PyTorch's own savers, which run threads of their own and know no event loop."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint.staging import AsyncStager as TorchAsyncStager

from aiostage.dcp.loop_thread import LoopThread
from aiostage.errors import StagerClosedError, StagingError
from aiostage.options import StagerStatistics, StagingOptions
from aiostage.sharing import share
from aiostage.stager import AsyncStager

__all__ = ["TorchStager"]


class StagedDict(dict[Any, Any]):
    """A staged state dict that can be referred to weakly, and be opened by another process instead of sent there."""

    __slots__ = ("__weakref__", "_shared_arenas")

    def __init__(self, staged: Any = (), shared_arenas: Callable[[], Sequence[Any]] | None = None) -> None:
        super().__init__(staged)
        self._shared_arenas = shared_arenas

    def __reduce__(self) -> Any:
        """Pickle as a plain dict; in shared memory as a handle, where each tensor would get a descriptor of its own."""
        if self._shared_arenas is not None:
            # What holds no tensors, or cannot be pickled, is pickled in the ordinary way, or says why not there.
            with contextlib.suppress(StagingError):
                return _open, (share(dict(self), self._shared_arenas()),)
        return dict, (dict(self),)


def _open(handle: Any) -> Any:
    return handle.open()


class TorchStager(TorchAsyncStager):
    """A stager for ``torch.distributed.checkpoint.async_save(..., async_stager=...)``, and for ``torch_checkpointing``.

    It stages in an event loop of its own, in a thread, so the calling thread may run a loop or none. Unlike PyTorch's
    stagers it may be used for many saves at once: no staged state dict is overwritten while anything refers to it.

    Args:
        options: How to stage. With ``use_async_staging``, the default, :meth:`stage` returns a future, and
            ``async_save`` an ``AsyncSaveResponse``; without, both wait until the state is captured. With
            ``use_shared_memory`` a saver process opens the staged memory and is not sent a copy.

    Raises:
        AcceleratorUnavailableError: If an option demands what this machine does not have.
    """

    def __init__(self, options: StagingOptions | None = None) -> None:
        self._options = options if options is not None else StagingOptions()
        self._stager = AsyncStager(self._options)
        self._loop = LoopThread("aiostage-torch-stager")
        self._pending: Future[Any] | None = None
        self._latest: weakref.ref[StagedDict] | None = None

    def stage(self, state_dict: Any, keys_not_requiring_copy: Sequence[str] = ()) -> Any:
        """Stage a state dict. The moment is that of the call.

        Args:
            state_dict: Any deep-copyable tree with tensors in it.
            keys_not_requiring_copy: Top-level keys whose values are put into the staged dict as they are.

        Returns:
            A ``concurrent.futures.Future`` of the staged copy; or the copy, with ``use_async_staging=False``.

        Raises:
            UnsupportedLeafError: If a leaf cannot be staged faithfully; nothing was copied.
            TornSnapshotError: If the source changed before it was captured.
            HostMemoryError: If memory cannot be had.
            StagerClosedError: If the stager is closed, at the call or while it runs.

        Except for the last at the call, errors come from the future, if there is one.
        """
        self._loop.check()
        if not self._loop.running:
            raise StagerClosedError
        kept = {key: state_dict[key] for key in keys_not_requiring_copy}
        copied = {key: state_dict[key] for key in state_dict if key not in kept} if kept else state_dict
        frame = copy.copy(state_dict) if kept else None
        # Called in this thread: what has to be waited for is on its streams.
        staging = self._stager.stage(copied)
        future = self._loop.submit(self._finish(staging, frame))
        if not self._options.use_async_staging:
            return future.result()
        self._pending = future
        future.add_done_callback(self._forget)
        return future

    async def _finish(self, staging: Coroutine[Any, Any, Any], frame: Any) -> Any:
        staged = await staging
        if frame is not None:
            frame.update(staged)
            staged = frame
        if type(staged) is dict:
            shared = self._options.use_shared_memory
            staged = StagedDict(staged, self._stager._resources.pool.leased if shared else None)
            self._latest = weakref.ref(staged)
        return staged

    def _forget(self, future: Future[Any]) -> None:
        # A future keeps its result, and the result its memory.
        if self._pending is future:
            self._pending = None

    def synchronize_staging(self) -> None:
        """Wait until the latest state dict is captured. Its errors come from its future."""
        pending = self._pending
        if pending is not None:
            pending.exception()

    def get_staged_state_dict(self) -> object | None:
        """Return the staged dict that was captured last, if anything still refers to it."""
        return self._latest() if self._latest is not None else None

    def pinned_num_bytes(self) -> int:
        """Return how many bytes of host memory are page-locked now."""
        return self.statistics().pinned_bytes

    def statistics(self) -> StagerStatistics:
        """Return what the stager has done and what it holds now."""
        return self._stager.statistics()

    def close(self) -> None:
        """Close: stagings under way end with StagerClosedError. Staged state dicts stay valid. Idempotent."""
        if self._loop.running:
            self._loop.run(self._stager.aclose())
            self._loop.stop()
