"""A checkpoint back to a tree, or into a live one."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Iterable
from time import perf_counter
from typing import Any

import torch

from aiostage._arguments import check_flags
from aiostage._device import CallerStreams, default_backend
from aiostage._loop.coroutines import named
from aiostage.abc import Backend
from aiostage.checkpoint.devices import DeviceOption, Devices
from aiostage.checkpoint.fit import Fit, StrictOption
from aiostage.checkpoint.loading import Loading
from aiostage.checkpoint.progress import LoadProgress, ProgressOption, reporting
from aiostage.checkpoint.resolving import is_removed, open_checkpoint
from aiostage.checkpoint.selection import Only, Selection
from aiostage.checkpoint.stateful import stateful_in
from aiostage.errors import CheckpointError, CheckpointNotFoundError, shown
from aiostage.format.classes import Classes
from aiostage.observe import span
from aiostage.storage.locate import Target, locate

__all__ = ["load", "load_after"]

_logger = logging.getLogger("aiostage")

_ATTEMPTS = 10
"""How often reading begins anew when the checkpoint is replaced meanwhile."""


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
            tensor is put into its dicts and lists. None: return a new tree. It, or a value of it if it is a dict,
            may be an object with ``state_dict`` and ``load_state_dict`` (DCP's ``Stateful``, such as a module or an
            optimizer): its ``load_state_dict`` is called with what was saved, on the event loop, when all else is done.
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
            path that returns whether it is wanted. What is chosen is loaded with all that is below it. Nothing
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
            was changed then, nor read but headers.
        HostMemoryError: If memory for the tensors cannot be had.
        AcceleratorUnavailableError: If there is no accelerator for ``device``.
        torch.OutOfMemoryError: If a device has no room.
        StagingError: If a device has failed.
        TypeError: If an argument has the wrong type, or ``device`` returns what is no device.
        ValueError: If ``only`` matches nothing, there is no ``into`` for ``in_place``, ``strict``
            or ``cast``, or ``device`` cannot be had: of
            tensors that share memory, each on another; sparse and quantized ones on the meta device.
        OSError: If the storage refuses.

    Unless ``in_place``, ``into`` is not changed before everything was read, verified and compared, for which the
    tensors are in host memory a second time. What a Stateful object raises
    comes after all else was changed. May be cancelled: either nothing of ``into`` has been changed then, or
    everything.
    """
    backend = backend if backend is not None else default_backend()
    caller = CallerStreams.record(backend if into is not None or device is not None else None, into)
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
    if in_place and stateful_in(into):
        raise ValueError("in_place=True reads into tensors, and into= has objects that take whole state dicts")
    if in_place and into is None:
        raise ValueError("in_place=True needs a live tree to load into: pass into=")
    if device is not None and into is not None:
        raise ValueError("device= is for a new tree; the tensors of into= stay on the devices that they are on")
    selection = Selection(only, f"{storage.location}/{name}") if only is not None else None
    known = Classes(classes, _declared())
    with span("load", source=name), reporting(progress, f"loading {name}") as report:
        backend = backend if backend is not None else default_backend()
        devices = Devices(device, backend)
        reaches = into is not None or device is not None
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
                    tree = await loading.attempt(reader)
                    _logger.info("loaded %s in %.3f s", reader.location, perf_counter() - begin)
                    return tree
                except CheckpointNotFoundError:
                    if await is_removed(storage, name):
                        raise
                    # Replaced while it was read; if it was deleted, the next attempt says so.
                    continue
                finally:
                    await reader.aclose()
    raise CheckpointError("it keeps being replaced while it is read.", path=name)


def _declared() -> list[type]:
    """Return the classes that the process has declared safe for files to name."""
    return [cls for cls in torch.serialization.get_safe_globals() if isinstance(cls, type)]
