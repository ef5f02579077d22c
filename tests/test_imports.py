"""What is imported while the event loop runs: an import on its thread holds it for as long as it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio, pathlib, sys, threading
import torch
import aiostage
from aiostage import AsyncStager, Checkpointer, load, save

found, step = [], None

def hook(event, arguments):
    # The event comes only for modules that are not imported yet.
    if event == "import" and step is not None:
        found.append((step, arguments[0], threading.current_thread().name))

sys.addaudithook(hook)

def tree():
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return states | {"large": torch.ones(3 << 20), "rest": [1, None]}

async def main(folder):
    global step
    live = tree()
    step = "stage"
    async with AsyncStager() as stager:
        await stager.stage(live)
    step = "save"
    await save(live, folder / "saved")
    step = "load"
    await load(folder / "saved")
    step = "load into"
    await load(folder / "saved", into=live)
    step = "load in place"
    await load(folder / "saved", into=live, in_place=True)
    step = "Checkpointer"
    async with Checkpointer(folder / "run") as checkpoints:
        await (await checkpoints.save(1, live)).committed()
    step = "the test's own"
    sys.path.append(str(folder))
    import late
    step = None

asyncio.run(main(pathlib.Path(sys.argv[1])))
print(found)
"""


def test_nothing_is_imported_while_the_loop_runs(tmp_path: Path) -> None:
    # A new interpreter: other tests have imported everything in this one.
    (tmp_path / "late.py").touch()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[(\"the test's own\", 'late', 'MainThread')]"
