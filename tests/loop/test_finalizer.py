"""Functions that are called when objects die, also while the interpreter ends."""

from __future__ import annotations

import gc
import subprocess
from pathlib import Path

import pytest

from aiostage._loop.coroutines import Finalizer
from tests.patience import seconds
from tests.warm import PYTHON


class Owner:
    pass


def test_called_once_when_the_object_dies() -> None:
    called: list[int] = []
    owner = Owner()
    finalizer = Finalizer(owner, called.append, 1)
    assert finalizer.alive
    assert called == []
    del owner
    assert called == [1]
    assert not finalizer.alive
    finalizer()
    assert called == [1]


def test_called_when_nothing_keeps_the_finalizer() -> None:
    called: list[int] = []
    owner = Owner()
    Finalizer(owner, called.append, 1)
    gc.collect()
    del owner
    assert called == [1]


def test_called_before_the_object_dies() -> None:
    called: list[int] = []
    owner = Owner()
    finalizer = Finalizer(owner, called.append, 1)
    finalizer()
    assert called == [1]
    assert not finalizer.alive
    assert not finalizer.detach()
    del owner
    assert called == [1]


def test_detached() -> None:
    called: list[int] = []
    owner = Owner()
    finalizer = Finalizer(owner, called.append, 1)
    assert finalizer.detach()
    assert not finalizer.detach()
    assert not finalizer.alive
    del owner
    assert called == []


def test_one_that_fails_is_called_once(capsys: pytest.CaptureFixture[str]) -> None:
    owner = Owner()
    finalizer = Finalizer(owner, [].pop)
    with pytest.raises(IndexError):
        finalizer()
    assert not finalizer.alive
    del owner
    assert capsys.readouterr().err == ""


AT_EXIT = """
import asyncio, socket, sys, threading, weakref
import torch, aiostage
from aiostage.storage.pointer import Heartbeat
from aiostage.testing import SimulatedAccelerator

class Slow(dict):
    def items(self):
        for item in super().items():
            exiting.set()
            died.wait()
            yield item

exiting, died = threading.Event(), threading.Event()
weakref.finalize._registry = Slow(weakref.finalize._registry)

async def main():
    accelerator = SimulatedAccelerator()
    async with aiostage.AsyncStager(backend=accelerator) as stager:
        return await stager.stage({"a": accelerator.to_device(torch.ones(1 << 20))})

staged = [asyncio.run(main())]
if sys.platform == "linux":
    from aiostage.weights.sockets import PacketSocket

    staged += map(PacketSocket, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
staged.append(Heartbeat(print, 1000, "aiostage-heartbeat"))

def drop():
    exiting.wait()
    staged.clear()
    died.set()

threading.Thread(target=drop, daemon=True).start()
# Of another package.
weakref.finalize(main, print, "called")
"""


def test_what_dies_in_a_thread_at_exit_stops_no_other_finalizer() -> None:
    done = subprocess.run(
        [*PYTHON, "-c", AT_EXIT],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=seconds(30),
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "called\n", "")
