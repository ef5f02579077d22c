"""The command `bench`: how fast staging is on this machine, compared with a plain copy, which is the limit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import anyio
import torch

from aiostage.checkpoint.load import load
from aiostage.checkpoint.save import save
from aiostage.cli.output import Output
from aiostage.stager import AsyncStager

__all__ = ["bench"]

_TICK_SECONDS = 0.001
_IDLE_SECONDS = 0.5


async def bench(nbytes: int, tensors: int, rounds: int, out: Output) -> None:
    """Stage, save and load a state dict of zeros in host memory, in a temporary directory.

    Args:
        nbytes: Size of the state dict.
        tensors: How many tensors it has.
        rounds: How often it is staged.
        out: Where to print medians. A coroutine that wants to run every millisecond measures the event loop's delays.
    """
    elements = max(1, nbytes // tensors // 4)
    state = {str(number): torch.zeros(elements, device="cpu") for number in range(tensors)}
    total = elements * tensors * 4
    out.data.update(tensors=tensors, nbytes=total, rounds=rounds, torch=torch.__version__, measured=[])
    out.line(f"{tensors} tensors, {total / 2**20:.0f} MiB in host memory, PyTorch {torch.__version__}", "bold")
    copy = {name: torch.empty_like(tensor) for name, tensor in state.items()}

    def copied() -> None:
        for name, tensor in state.items():
            copy[name].copy_(tensor)

    idle = await _timed(lambda: anyio.sleep(_IDLE_SECONDS))
    out.data["idle_worst_delay_seconds"] = idle[1]
    # One round more than counted: the first one also pays for the pages of the target.
    plain = [await _timed(lambda: anyio.to_thread.run_sync(copied)) for _ in range(rounds + 1)]
    _tell(out, "plain copy into warm memory", plain[1:], total)
    async with AsyncStager() as stager:
        first = await _timed(lambda: stager.stage(state))
        _tell(out, "first staging", [first], total)
        later = [await _timed(lambda: stager.stage(state)) for _ in range(rounds)]
        _tell(out, "later stagings", later, total)
        async with anyio.TemporaryDirectory() as directory:
            target = Path(directory) / "checkpoint"
            saved = [await _timed(lambda: save(state, target, stager=stager, overwrite=True)) for _ in range(rounds)]
            _tell(out, "save to disk", saved, total)
            loaded = [await _timed(lambda: load(target, into=state, in_place=True)) for _ in range(rounds)]
            _tell(out, "load in place, verified", loaded, total)
    out.line(
        "'worst' is the longest that an event loop waited for its turn meanwhile; "
        f"with nothing else to do it was {idle[1] * 1e3:.1f} ms on this machine"
    )


class _Ticker:
    """Measures how late a coroutine is that wants to run every millisecond."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def run(self) -> None:
        while True:
            begin = perf_counter()
            await anyio.sleep(_TICK_SECONDS)
            self.worst = max(self.worst, perf_counter() - begin - _TICK_SECONDS)


async def _timed(call: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """Return how long a coroutine took, and the worst delay meanwhile, in seconds."""
    ticker = _Ticker()
    async with anyio.create_task_group() as group:
        group.start_soon(ticker.run)
        begin = perf_counter()
        await call()
        seconds = perf_counter() - begin
        group.cancel_scope.cancel()
    return seconds, ticker.worst


def _tell(out: Output, what: str, times: list[tuple[float, float]], nbytes: int) -> None:
    seconds = median(each for each, _ in times)
    worst = max(delay for _, delay in times)
    out.data["measured"].append({"what": what, "seconds": seconds, "worst_delay_seconds": worst})
    out.line(f"{what:<30}{seconds * 1e3:>10.1f} ms{nbytes / seconds / 1e9:>8.2f} GB/s   worst {worst * 1e3:.1f} ms")
    out.flush()
