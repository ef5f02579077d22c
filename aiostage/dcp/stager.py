"""Our staging for PyTorch's own savers, which run threads of their own and know no event loop."""

from __future__ import annotations

import copy
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

from torch.distributed.checkpoint.staging import AsyncStager as TorchAsyncStager

from aiostage.dcp.loop_thread import LoopThread
from aiostage.errors import StagerClosedError
from aiostage.options import StagerStatistics, StagingOptions
from aiostage.stager import AsyncStager

__all__ = ["TorchStager"]


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
        self._under_way: set[Future[Any]] = set()
        self._latest: Future[Any] | None = None
        self._closing = False

    def stage(self, state_dict: Any, keys_not_requiring_copy: Sequence[str] = (), **ignored: Any) -> Any:
        """Stage a state dict. The moment is that of the call.

        Args:
            state_dict: Any deep-copyable tree with tensors in it.
            keys_not_requiring_copy: Top-level keys of a dict whose values are put into the staged one as they are.
                Those that it does not have are ignored.
            **ignored: What callers pass to other stagers; it changes nothing, as with PyTorch's.

        Returns:
            A ``concurrent.futures.Future`` of the staged copy, which has the types of the original; or the copy, with
            ``use_async_staging=False``.

        Raises:
            UnsupportedLeafError: If a leaf cannot be staged faithfully; nothing was copied.
            TornSnapshotError: If the source changed before it was captured.
            HostMemoryError: If memory cannot be had.
            StagerClosedError: If the stager is closed.

        Except for the last, errors come from the future, if there is one.
        """
        self._loop.check()
        if self._closing or not self._loop.running:
            raise StagerClosedError
        # Before the staging: the memory of the last one can then be used again for this one.
        self._latest = None
        kept, copied = {}, state_dict
        if isinstance(state_dict, Mapping):
            kept = {key: state_dict[key] for key in keys_not_requiring_copy if key in state_dict}
        if kept:
            copied = copy.copy(state_dict)
            copied.update(dict.fromkeys(kept))
        # stage() is called in this thread: the copies follow what was enqueued on its streams.
        future = self._loop.submit(_finish(self._stager.stage(copied), kept))
        # In this order: for a future that is done, the callback runs at once. No lock, because each of the two is one
        # operation on the set.
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        self._latest = future
        return future if self._options.use_async_staging else future.result()

    def synchronize_staging(self) -> None:
        """Wait until the latest state dict is captured.

        Raises:
            Exception: The errors of :meth:`stage`.
        """
        latest = self._latest
        if latest is not None:
            latest.result()

    def get_staged_state_dict(self) -> Any:
        """Return what was staged last; None if that is under way or has failed, and after :meth:`close`.

        The stager refers to it until the next :meth:`stage` begins, so that its memory can be used again only then.
        """
        latest = self._latest
        if latest is None or not latest.done() or latest.cancelled() or latest.exception() is not None:
            return None
        return latest.result()

    def pinned_num_bytes(self) -> int:
        """Return how many bytes of host memory are page-locked now."""
        return self.statistics().pinned_bytes

    def statistics(self) -> StagerStatistics:
        """Return what the stager has done and what it holds now."""
        return self._stager.statistics()

    def close(self) -> None:
        """Take no more, wait for stagings under way, and close. Staged state dicts stay valid. Idempotent.

        With ``max_host_bytes`` a staging may be waiting for memory; drop what was staged before, or it waits for ever.
        """
        self._closing = True
        self._latest = None
        if self._loop.running:
            # A copy: each removes itself from the set when it is done, in the loop's thread.
            wait(tuple(self._under_way))
            self._loop.run(self._stager.aclose())
            self._loop.stop()


async def _finish(staging: Coroutine[Any, Any, Any], kept: dict[Any, Any]) -> Any:
    staged = await staging
    if kept:
        staged.update(kept)
    return staged
