"""How much of the package a stage, a save, an incremental save and a load pass through: `python -m tests.depth`."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import aiostage
from aiostage import AsyncStager, Checkpointer

__all__ = ["Depth", "measure"]

PACKAGE = str(Path(aiostage.__file__).parent) + "/"


class Depth:
    """Records the frames of the package that are entered, in all threads that are started after :meth:`install`."""

    def __init__(self) -> None:
        self._counting = False
        self._entered: set[CodeType] = set()
        self._deepest: list[str] = []

    def install(self) -> None:
        """Record from now on what :meth:`count` runs."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    async def count(self, make: Callable[[], Awaitable[object]]) -> dict[str, Any]:
        """Await something, and return what it has entered."""
        self._entered, self._deepest = set(), []
        self._counting = True
        try:
            await make()
        finally:
            self._counting = False
        functions = {(code.co_filename, name_of(code)) for code in self._entered}
        return {
            "files": sorted({file.removeprefix(PACKAGE) for file, _ in functions}),
            "functions": len(functions),
            "classes": len({(file, name.rpartition(".")[0]) for file, name in functions if is_method(name)}),
            "frames": len(self._deepest),
            "deepest": self._deepest,
        }

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if not self._counting or event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        self._entered.add(frame.f_code)
        stack: list[str] = []
        above: FrameType | None = frame
        while above is not None:
            code = above.f_code
            if code.co_filename.startswith(PACKAGE):
                stack.append(f"{code.co_filename.removeprefix(PACKAGE)}: {name_of(code)}")
            above = above.f_back
        if len(stack) > len(self._deepest):
            self._deepest = stack


def name_of(code: CodeType) -> str:
    """Return the qualified name of a function."""
    return code.co_qualname


def is_method(name: str) -> bool:
    """Return whether a qualified name is that of a function in a class."""
    return bool(name.rpartition(".")[0]) and not name.rpartition(".")[0].endswith("<locals>")


def tree() -> dict[str, Any]:
    """Return a small state dict, as a model and its optimizer have it."""
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 100)).sum().backward()
    optimizer.step()
    return {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}


async def measure() -> dict[str, dict[str, Any]]:
    """Return what a first stage, a save and a load of new objects enter, and an incremental save, by its name."""
    depth = Depth()
    depth.install()
    found: dict[str, dict[str, Any]] = {}
    state = tree()
    with tempfile.TemporaryDirectory() as folder:
        # What is done once in a process is not counted.
        await aiostage.save(state, f"{folder}/first")
        await aiostage.load(f"{folder}/first")
        # First, since a stager that is closed gives its memory back in a thread of its own.
        found["load"] = await depth.count(lambda: aiostage.load(f"{folder}/first"))
        async with AsyncStager() as stager:
            found["stage"] = await depth.count(lambda: stager.stage(state))
        async with AsyncStager() as stager:
            found["save"] = await depth.count(lambda: aiostage.save(state, f"{folder}/a", stager=stager))
        async with AsyncStager() as stager, Checkpointer(f"{folder}/run", stager, incremental=True, keep=2) as run:

            async def save(step: int) -> None:
                await (await run.save(step, state)).committed()

            await save(0)
            await save(1)
            # Compared with the last one, and followed by a removal.
            found["incremental save"] = await depth.count(lambda: save(2))
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure()), indent=2))
