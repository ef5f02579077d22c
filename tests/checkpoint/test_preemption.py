from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress

import anyio
import anyio.lowlevel
import pytest

from aiostage import Checkpointer
from tests.checkpoint.memory_storage import MemoryStorage
from tests.checkpoint.test_checkpointer import Gate, tree, until
from tests.forking import run_forking
from tests.patience import seconds

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[int]]:
    """Handlers that another library has set, and that are to be put back."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in SIGNALS}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


async def train(checkpoints: Checkpointer, send_at: int) -> int:
    """Train until told to end; return the last step."""
    step = 0
    while True:
        step += 1
        if step == send_at:
            os.kill(os.getpid(), signal.SIGTERM)
        await anyio.sleep(0.001)
        if checkpoints.preempted.is_set():
            await checkpoints.save(step, tree(step))
            return step


async def saves_and_leaves(handlers: list[int]) -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage, save_on_signals=SIGNALS) as checkpoints:
        with anyio.fail_after(seconds(10)):
            last = await train(checkpoints, send_at=3)
    assert last >= 3
    assert await checkpoints.latest() == last
    assert handlers == []
    for number in SIGNALS:
        os.kill(os.getpid(), number)
    assert handlers == list(SIGNALS)


@pytest.mark.asyncio
async def test_a_signal_saves_and_the_handlers_come_back(handlers: list[int]) -> None:
    await saves_and_leaves(handlers)


@pytest.mark.anyio
async def test_on_trio(handlers: list[int]) -> None:
    await saves_and_leaves(handlers)


@pytest.mark.asyncio
async def test_more_signals_change_nothing(handlers: list[int]) -> None:
    storage = MemoryStorage()
    gate = Gate(storage)

    async def shower() -> None:
        await until(lambda: gate.waiting == 1)
        for number in SIGNALS:
            os.kill(os.getpid(), number)
            await anyio.sleep(0.01)
        gate.open.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(shower())
        async with Checkpointer(storage, save_on_signals=SIGNALS) as checkpoints:
            await train(checkpoints, send_at=1)
    assert len(storage.checkpoints) == 1
    assert handlers == []


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["error", "cancelled", "cancelled in entering"])
async def test_the_handlers_come_back_after_any_outcome(how: str, handlers: list[int]) -> None:
    storage = MemoryStorage()
    checkpoints = Checkpointer(storage, save_on_signals=SIGNALS)

    async def run() -> None:
        async with checkpoints:
            if how == "error":
                raise LookupError
            await anyio.sleep_forever()

    running = asyncio.create_task(run())
    if how != "cancelled in entering":
        await until(lambda: storage.operations["clean_up"] == 1)
        await anyio.sleep(0.01)
    running.cancel()
    with suppress(LookupError, asyncio.CancelledError):
        await running
    os.kill(os.getpid(), signal.SIGTERM)
    await anyio.lowlevel.checkpoint()
    assert handlers == [signal.SIGTERM]


@pytest.mark.asyncio
async def test_without_signals_nothing_is_touched(handlers: list[int]) -> None:
    async with Checkpointer(MemoryStorage()) as checkpoints:
        os.kill(os.getpid(), signal.SIGTERM)
        await anyio.sleep(0.01)
        assert not checkpoints.preempted.is_set()
    assert handlers == [signal.SIGTERM]


def test_only_the_main_thread_can() -> None:
    storage = MemoryStorage()
    errors: list[BaseException] = []

    async def run() -> None:
        async with Checkpointer(storage, save_on_signals=SIGNALS):
            pass

    def thread() -> None:
        try:
            asyncio.run(run())
        except RuntimeError as error:
            errors.append(error)

    other = threading.Thread(target=thread)
    other.start()
    other.join()
    assert "SIGTERM, SIGUSR1) can only be received in the main thread" in str(errors[0])


def test_what_is_no_signal() -> None:
    with pytest.raises(ValueError, match="1234"):
        Checkpointer(MemoryStorage(), save_on_signals=[1234])  # type: ignore[list-item]


FORKING = """
import anyio, logging
from aiostage import Checkpointer
from tests.checkpoint.memory_storage import MemoryStorage

seen = []
logging.disable()
signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))

async def main():
    async with Checkpointer(MemoryStorage(), save_on_signals=[signal.SIGUSR1, signal.SIGTERM]) as checkpoints:

        def child():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert seen == [signal.SIGUSR1]
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

        in_child(child)
        for _ in range(20):
            await anyio.sleep(0.001)
        assert not checkpoints.preempted.is_set()
        os.kill(os.getpid(), signal.SIGUSR1)
        await checkpoints.preempted.wait()
    assert seen == []

anyio.run(main, backend="BACKEND")
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_signals_of_a_forked_child_are_its_own(backend: str) -> None:
    run_forking(FORKING.replace("BACKEND", backend))
