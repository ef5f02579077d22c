"""Lightning's checkpoints through aiostage: captured while training waits, written while it goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import anyio
import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal

from aiostage._extras import needed_for
from aiostage.blocking import load
from aiostage.checkpoint.load import load as async_load
from aiostage.checkpoint.save import save
from aiostage.errors import CheckpointNotFoundError
from aiostage.options import StagingOptions
from aiostage.stager import AsyncStager

with needed_for("AiostageCheckpointIO"):
    from pytorch_lightning import LightningDataModule, LightningModule
    from pytorch_lightning.plugins.io import CheckpointIO, TorchCheckpointIO

__all__ = ["AiostageCheckpointIO", "load_from_checkpoint"]

T = TypeVar("T", LightningModule, LightningDataModule)


class AiostageCheckpointIO(CheckpointIO):
    """A plugin for ``Trainer(plugins=[...])`` that saves and loads what ``ModelCheckpoint`` asks for.

    ``save_checkpoint`` returns once the state is captured. Files are written, and old checkpoints removed, in that
    order, by an event loop in a background thread. Checkpoints are directories in aiostage's format: what JSON cannot
    carry beside the tensors is refused with its path.

    Args:
        options: How to stage.
    """

    def __init__(self, options: StagingOptions | None = None) -> None:
        self._options = options
        self._exit: ExitStack | None = None
        self._portal: BlockingPortal | None = None
        self._stager: AsyncStager | None = None
        self._turn = anyio.Lock()
        self._under_way: list[Future[Any]] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Capture a checkpoint, and leave the writing to the background.

        Args:
            checkpoint: The checkpoint, as Lightning has made it.
            path: The directory to make; a checkpoint that is there is replaced.
            storage_options: Nothing is known; must be None.

        Raises:
            TypeError: If there are ``storage_options``.
            Exception: The error of an earlier save.
        """
        if storage_options is not None:
            raise TypeError("AiostageCheckpointIO takes no storage_options")
        self._raise_failures()
        portal, stager = self._begun()
        # Called in this thread: the copies follow what was enqueued on its current streams.
        staging = stager.stage(checkpoint)
        staged = portal.call(lambda: staging)
        self._in_background(partial(save, staged, os.fspath(path), overwrite=True))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, after those under way have been written.

        Args:
            path: A directory that :meth:`save_checkpoint` has made; or a file of ``torch.save``, such as Lightning's
                own ``.ckpt``, which is read as Lightning does.
            map_location: A device or its name, for all tensors. Anything else, also a function or a dict, is about
                storages in files of ``torch.save`` and not used for directories: tensors come in host memory then.
            weights_only: Not used for directories, which hold no code.

        Raises:
            CheckpointNotFoundError: If there is no checkpoint.
            CheckpointCorruptError: If it is damaged.
        """
        self._wait()
        if Path(path).is_file():
            # What was not given is left out: Lightning has defaults of its own, and its older releases do not know
            # weights_only.
            given = {"map_location": map_location, "weights_only": weights_only}
            options = {name: value for name, value in given.items() if value is not None}
            theirs: dict[str, Any] = TorchCheckpointIO().load_checkpoint(Path(path), **options)
            return theirs
        portal, _ = self._begun()
        device = map_location if isinstance(map_location, (torch.device, str)) else None
        # Called in this thread, as in save_checkpoint().
        loading = async_load(os.fspath(path), device=device)
        checkpoint: dict[str, Any] = portal.call(lambda: loading)
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, after what was asked for before has been written."""
        self._in_background(partial(_remove, os.fspath(path)))

    def teardown(self) -> None:
        """Wait for what is under way, and end the background thread. What was torn down may be used again.

        Raises:
            Exception: The error of a save.
        """
        stack, self._exit = self._exit, None
        self._portal = self._stager = None
        if stack is not None:
            stack.close()
        self._raise_failures()

    def _begun(self) -> tuple[BlockingPortal, AsyncStager]:
        if self._portal is None or self._stager is None:
            with ExitStack() as stack:
                self._portal = stack.enter_context(start_blocking_portal(name="aiostage-lightning"))
                stager = AsyncStager(self._options)
                self._stager = stack.enter_context(self._portal.wrap_async_context_manager(stager))
                # Last in, first out: everything is written before the stager closes.
                stack.callback(self._wait)
                self._exit = stack.pop_all()
        return self._portal, self._stager

    def _in_background(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        # Tasks start in the order of the calls, and anyio's lock is fair. So a removal never runs before an earlier
        # save.
        async def in_turn() -> None:
            async with self._turn:
                await call()

        portal, _ = self._begun()
        self._under_way.append(portal.start_task_soon(in_turn))

    def _wait(self) -> None:
        for future in self._under_way:
            future.exception()

    def _raise_failures(self) -> None:
        """Raise the error of a save that has ended."""
        ended = [future for future in self._under_way if future.done()]
        self._under_way = [future for future in self._under_way if not future.done()]
        errors = [error for future in ended if isinstance(error := future.exception(), Exception)]
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup(f"{len(errors)} checkpoints failed", errors)


async def _remove(path: str) -> None:
    if await anyio.Path(path).is_symlink():
        # What the link leads to may belong to others.
        await anyio.Path(path).unlink()
        return
    if not await anyio.Path(path).exists():
        raise CheckpointNotFoundError("there is no checkpoint to remove.", path=path)
    # A run that continues from Lightning's own files removes those too.
    is_file = await anyio.Path(path).is_file()
    await anyio.to_thread.run_sync(os.unlink if is_file else shutil.rmtree, path)


def load_from_checkpoint(cls: type[T], path: str | os.PathLike[str], **options: Any) -> T:
    """Make a module of a checkpoint: ``Net.load_from_checkpoint`` for the directories of this plugin.

    Args:
        cls: The module's class.
        path: A directory that :class:`AiostageCheckpointIO` has made, or a file of Lightning's.
        **options: What ``cls.load_from_checkpoint`` takes.

    Returns:
        The module, with its hyperparameters and weights.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint.
        CheckpointCorruptError: If it is damaged.
    """
    if Path(path).is_file():
        return cls.load_from_checkpoint(Path(path), **options)
    checkpoint = load(os.fspath(path))
    with TemporaryDirectory(prefix="aiostage-lightning-") as folder:
        file = Path(folder) / "checkpoint.ckpt"
        torch.save(checkpoint, file)
        return cls.load_from_checkpoint(file, **options)
