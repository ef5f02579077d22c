"""DCP's in-place load as a coroutine."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Coroutine, MutableMapping
from functools import partial
from typing import IO, Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.storage import StorageReader as TorchStorageReader

from aiostage import _private
from aiostage._arguments import check_flags, check_optional
from aiostage._loop.coroutines import named
from aiostage.dcp.group_queue import DEFAULT_TIMEOUT, Action, QueuedOperation, operation_for
from aiostage.dcp.keys import KeyedLoadPlanner
from aiostage.dcp.storage import StorageReader
from aiostage.errors import shown

__all__ = ["check_into", "load", "load_in_group"]

_AT_ONCE_BYTES = 1 << 20
"""The longest record that is read at once. Measured: a load of records of 4 to 335 KiB takes 10 to 14 % less, of 2 MiB
the same, of 4 MiB 18 % more, because so much memory is mapped anew for each record."""


class _FileReader(FileSystemReader):
    """DCP's reader of a directory, except that it reads each small record at once.

    ``torch.load`` reads some twenty times in a record. DCP gives it a view of the file, in which each of them is a call
    of Python and a system call.
    """

    # A private method: this class is used where PyTorch's takes the same arguments.
    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        # read() would take a length below 0 for all of the rest.
        if not 0 <= sinfo.length <= _AT_ONCE_BYTES:
            return super()._slice_file(file, sinfo)
        file.seek(sinfo.offset)
        return io.BytesIO(file.read(sinfo.length))


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: TorchStorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: Any = None,
    no_dist: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
    weights_only: bool = True,
) -> Coroutine[Any, Any, None]:
    """Return a coroutine that loads a checkpoint into a state dict, in place, together with other ranks.

    It runs ``torch.distributed.checkpoint.load`` in a thread, on the process group and in the order of
    :func:`~aiostage.dcp.save`: a load that follows a save waits for it. Tensors are overwritten and other values are
    replaced. The methods ``state_dict`` and ``load_state_dict`` of values are called in that thread, on the device and
    the streams that are current at the call.

    Args:
        state_dict: The state dict to load into. Do not use it until the coroutine returns.
        checkpoint_id: The checkpoint, as the reader names it; a directory if there is no reader.
        storage_reader: One of DCP's, or a :class:`StorageReader`. None: the one that DCP finds for the id.
        planner: One of DCP's. None is DCP's default, with one difference: values come back under their own keys, and
            not under these as text.
        process_group: The ranks that load together; None for all ranks.
        no_dist: This process loads alone, as it does if there are no process groups.
        timeout: Seconds to wait for other ranks: to come, and then in each step for the slowest to read.
        weights_only: Refuse values that are not plain data, as ``torch.load`` does; arrays and numbers of NumPy are
            taken, and classes that were passed to ``torch.serialization.add_safe_globals``. False runs whatever code
            the checkpoint names. A ``planner`` of your own decides for itself; DCP's own planners run the code, and
            so do DCP's own readers, whatever this says, for the metadata.

    Returns:
        A coroutine.

    Raises:
        RankFailedError: If any rank failed. Tensors may have been overwritten then, unless it failed before all ranks
            came together.
        TypeError: If an argument has the wrong type.
        ValueError: If there is neither an id nor a reader, or this rank is not in the group, or the timeout is not
            above 0.

    When cancelled before all ranks have entered the collectives, nothing is loaded, and the others raise
    :class:`~aiostage.RankFailedError` that names this one. Later it is completed first.
    """
    if storage_reader is None and checkpoint_id is None:
        raise ValueError("a load needs a checkpoint_id or a storage_reader to say where from")
    check_flags(weights_only=weights_only)
    check_into(state_dict, planner)
    if storage_reader is None:
        # What a reader of the caller's takes for an id is its own affair.
        check_optional("checkpoint_id", checkpoint_id, (str, os.PathLike), "a path")
    check_optional("storage_reader", storage_reader, TorchStorageReader, "a StorageReader of DCP")
    if planner is None:
        planner = KeyedLoadPlanner(weights_only=weights_only)
    call: QueuedOperation[None] = operation_for(process_group, state_dict, no_dist=no_dist, timeout=timeout)
    return named(_load(call, partial(_read, state_dict, checkpoint_id, storage_reader, planner)), "load")


def check_into(state_dict: object, planner: object) -> None:
    """Refuse what DCP cannot load into, or not by.

    Raises:
        TypeError: If it is not a dict, or the planner is none of DCP's.
    """
    if not isinstance(state_dict, MutableMapping):
        raise TypeError(f"a state dict to load into is a dict of names, not {shown(state_dict)}")
    check_optional("planner", planner, LoadPlanner, "a LoadPlanner of DCP")


async def _load(call: QueuedOperation[None], read: Action[None]) -> None:
    call.hand_over(read)
    try:
        await call.complete()
    finally:
        # DCP has copied on the streams of the call. Now others may be current: they wait for the copies.
        call.caller.order_current_stream_after()


def _read(
    state_dict: dict[str, Any],
    checkpoint_id: str | os.PathLike[str] | None,
    storage_reader: TorchStorageReader | None,
    planner: LoadPlanner,
) -> Callable[[Any], None]:
    """Find the reader, and return what needs the other ranks."""
    reader: Any = _private.require("storage_setup")(storage_reader, checkpoint_id, reader=True)
    found = storage_reader is None and type(reader) is FileSystemReader
    if found and checkpoint_id is not None and _private.slices_files():
        reader = _FileReader(checkpoint_id)
    return partial(load_in_group, state_dict, reader, planner)


def load_in_group(state_dict: dict[str, Any], reader: TorchStorageReader, planner: LoadPlanner, group: Any) -> None:
    """Load with a reader that has its checkpoint, in collectives of a process group or, with None, alone."""
    try:
        torch_load(state_dict, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        for raised, _ in error.failures.values():
            # PyTorch 2.11 does not pass the reason on. Reading again gives it.
            if str(raised) == "metadata is None":
                try:
                    reader.read_metadata()
                except Exception as reason:
                    raised.args = (f"metadata is None; global metadata read failed: {reason}",)
        raise
    finally:
        # DCP itself never tells a reader that a load has failed. After a load that has not, this does nothing.
        if isinstance(reader, StorageReader):
            reader.abandon()
