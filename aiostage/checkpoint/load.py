"""Reads a checkpoint back to a tree, or into a live one. What one load does is in ``loading``."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Iterable
from contextlib import nullcontext
from time import perf_counter
from typing import Any

from aiostage._arguments import FLAG, check_flags, stateful_in
from aiostage._device import CallerStreams, checked_backend, default_backend
from aiostage._loop.coroutines import named
from aiostage.abc import Backend
from aiostage.checkpoint.into import Fit, StrictOption
from aiostage.checkpoint.loading import Loading
from aiostage.checkpoint.progress import LoadProgress, ProgressOption, reporting
from aiostage.checkpoint.reader import open_checkpoint
from aiostage.checkpoint.selection import Only, Selection
from aiostage.checkpoint.targets import DeviceOption, Devices
from aiostage.errors import CheckpointError, CheckpointNotFoundError, shown
from aiostage.format.classes import Classes, declared_safe
from aiostage.format.registry import is_value
from aiostage.incremental.reading import is_removed
from aiostage.observe import span
from aiostage.storage.locate import Target, locate

__all__ = ["load", "load_after"]

_logger = logging.getLogger("aiostage")

_ATTEMPTS = 10
"""Attempts to read a checkpoint that other processes replace meanwhile. A guess: one attempt fails only if a whole save
ends during it."""


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
            tensor is put into its dicts and lists, and into objects that have tensors in them; a tuple gives way to a
            new one. Gradients and attributes of tensors are loaded where the checkpoint has them; others stay.
            None: return a new tree. It, or a value of it if it is a dict, may be an object with ``state_dict`` and
            ``load_state_dict`` (DCP's ``Stateful``, such as a module or an optimizer): its ``load_state_dict`` is
            called with what was saved, on the event loop and the streams of the call, when all else is done.
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
            or ``cast``; or a ``device`` cannot be used: different ones for tensors that share memory, or the meta
            device for sparse and quantized tensors.
        OSError: If the storage refuses.

    Unless ``in_place``, ``into`` is not changed before everything was read, verified and compared, for which the
    tensors are in host memory a second time. What a Stateful object raises comes after all else was changed. May be
    cancelled: either nothing of ``into`` has been changed then, or everything.
    """
    # At the call, not in the coroutine: a task may start that later, when the current streams are others.
    if into is not None or device is not None:
        backend = checked_backend(backend)
        caller = CallerStreams.record(backend, into)
    else:
        if backend is not None:
            # It is not used, but a wrong one is an error all the same.
            checked_backend(backend)
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

    Without ``foreign``, a checkpoint of another program counts as none.
    """
    storage, name = locate(source)
    check_flags(in_place=in_place, verify=verify, cast=cast)
    _check_options(into, in_place=in_place, strict=strict, cast=cast, device=device)
    selection = Selection(only, f"{storage.location}/{name}") if only is not None else None
    known = Classes(classes, declared_safe())
    with (
        span("load", source=name),
        reporting(progress, f"loading {name}") if progress is not None else nullcontext() as report,
    ):
        # A new tree in host memory needs no device, and no accelerator is initialized for it.
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
                    tree = await loading.attempt(reader)
                    await loading.drop_leftovers()
                    _logger.info("loaded %s in %.3f s", reader.location, perf_counter() - begin)
                    return tree
                except CheckpointNotFoundError:
                    if await is_removed(storage, name):
                        raise
                    # It was replaced while it was read, so the next attempt reads the new one. If it was deleted,
                    # open_checkpoint() says so in the next attempt.
                    continue
                finally:
                    await reader.aclose()
    raise CheckpointError("another process replaced it during each attempt to read it.", path=name)


def _check_options(into: Any, *, in_place: bool, strict: object, cast: bool, device: object) -> None:
    """Refuse options that do not go with one another."""
    if not isinstance(strict, FLAG) and not callable(strict):
        raise TypeError(f"strict must be True, False or a function of two lists of paths, not {shown(strict)}")
    if into is None and (cast or callable(strict) or not strict):
        raise ValueError("strict= and cast= are for a live tree: pass into=")
    if in_place and stateful_in(into, is_value):
        raise ValueError("in_place=True reads into tensors, and into= has objects that take whole state dicts")
    if in_place and into is None:
        raise ValueError("in_place=True needs a live tree to load into: pass into=")
    if device is not None and into is not None:
        raise ValueError("device= is for a new tree; the tensors of into= stay on the devices that they are on")
