"""Where the time of a checkpoint goes: a trace for https://ui.perfetto.dev, and the longest spans in numbers.

Own spans stand beside those of aiostage, so that the training loop and its checkpoints are seen in one picture. The
file goes where the first argument says, or into a temporary directory.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

import aiostage
from aiostage.observe import span
from aiostage.tracing import Trace, trace

STEPS = 6
STEPS_BETWEEN_CHECKPOINTS = 2


async def train(directory: Path) -> None:
    """Train, and save every other step while training goes on."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.randn(64, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    async with aiostage.AsyncStager() as stager, asyncio.TaskGroup() as saves:
        for number in range(1, STEPS + 1):
            with span("train step", number=number):
                await asyncio.to_thread(step)
            if number % STEPS_BETWEEN_CHECKPOINTS == 0:
                # Stage now, write while the next steps run. The tasks inherit the trace, as they do any context.
                staged = await stager.stage({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
                saves.create_task(aiostage.save(staged, directory / f"step-{number}", stager=stager))


def report(recorded: Trace) -> None:
    """Print how long spans of each name took together."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for found in recorded.spans:
        if found.end is not None:
            seconds[found.name].append(found.end - found.begin)
    print(f"{'span':<14}{'count':>7}{'total':>12}{'longest':>12}")
    for name, times in sorted(seconds.items(), key=lambda item: -sum(item[1])):
        print(f"{name:<14}{len(times):>7}{sum(times) * 1e3:>9.2f} ms{max(times) * 1e3:>9.2f} ms")


async def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        with trace() as recorded:
            await train(Path(directory))
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(directory) / "trace.json"
        await recorded.write(path)
        events = json.loads(path.read_text())["traceEvents"]
        report(recorded)
        print(f"\n{len(events)} events in {path}; open it with https://ui.perfetto.dev")


asyncio.run(main())
