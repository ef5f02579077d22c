"""Several ranks as processes of their own, started once and told what to run: gloo over loopback, and always reaped."""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing as mp
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from tests.patience import seconds

CONTEXT = mp.get_context("forkserver")
# Imported once, by the process that the ranks are forks of: that takes longer than most of what they run.
CONTEXT.set_forkserver_preload(["aiostage.dcp", "pytest", "torch.distributed.checkpoint", "tests.dcp.models"])


class RemoteError(AssertionError):
    """What a rank raised, with its traceback."""


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=seconds(30)))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds(50)))
    pipe.send((True, None))
    while True:
        try:
            module, name, arguments = pipe.recv()
        except (EOFError, TypeError):
            # Told to end, or the process that tells has gone.
            break
        try:
            outcome = getattr(importlib.import_module(module), name)(*arguments)
            if asyncio.iscoroutine(outcome):
                outcome = asyncio.run(outcome)
            pipe.send((True, outcome))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class World:
    """Ranks that run functions of test modules together."""

    def __init__(self, size: int) -> None:
        self.size = size
        # Kept by this process, as torchrun's agent does, so that it outlives any rank.
        self._store: dist.TCPStore | None = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self._store.port
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, size, port, theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers(50, range(size))

    def run(
        self,
        function: Callable[..., Any],
        *arguments: object,
        ranks: Sequence[int] | None = None,
        timeout: float = 50.0,
        answering: Sequence[int] | None = None,
    ) -> list[Any]:
        """Run a function on ranks, and return what each of them returned.

        Args:
            function: A function or coroutine function at the top level of a module.
            *arguments: Picklable.
            ranks: Which; None is all.
            timeout: Seconds for all of it, where nothing else runs.
            answering: Those that will live to answer; None is all that were asked.
        """
        asked = range(self.size) if ranks is None else ranks
        for rank in asked:
            self._pipes[rank].send((function.__module__, function.__qualname__, arguments))
        return self._answers(seconds(timeout), asked if answering is None else answering)

    def lose_the_store(self) -> None:
        """Let the rendezvous store go, as when the host that keeps it dies."""
        self._store = None

    def _answers(self, timeout: float, ranks: Sequence[int]) -> list[Any]:
        answers, errors = [], []
        for rank in ranks:
            if not self._pipes[rank].poll(timeout):
                raise RemoteError(f"rank {rank} does not answer within {timeout} seconds")
            fine, answer = self._pipes[rank].recv()
            answers.append(answer)
            if not fine:
                errors.append(f"rank {rank}:\n{answer}")
        if errors:
            raise RemoteError("\n".join(errors))
        return answers

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None):
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                # Killed by its test.
                continue
        # Those that were killed leave the others nothing to wait for.
        for process in self._processes:
            process.join(5 if error is None and all(other.exitcode in (None, 0) for other in self._processes) else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
