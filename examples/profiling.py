"""Where the time of a checkpoint goes: its spans in a profile of PyTorch's, and the longest in numbers.

A span of your own stands beside those of aiostage, so that one picture has the training loop and its checkpoints. The
file for https://ui.perfetto.dev goes where the first argument says, or into a temporary directory.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import aiostage
from aiostage.integrations.profiler import ProfilerObserver
from aiostage.observe import observing, span

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
                # Stage now, write while the next steps run. The tasks inherit the observer, as they do any context.
                staged = await stager.stage({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
                saves.create_task(aiostage.save(staged, directory / f"step-{number}", stager=stager))


def report(profiled: profile) -> None:
    """Print how long spans of each name took together."""
    spans = [row for row in profiled.key_averages() if row.key.startswith("aiostage.")]
    print(f"{'span':<24}{'count':>7}{'total':>12}")
    for row in sorted(spans, key=lambda row: -row.cpu_time_total):
        print(f"{row.key:<24}{row.count:>7}{row.cpu_time_total / 1e3:>9.2f} ms")


async def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        with profile(activities=[ProfilerActivity.CPU]) as profiled, observing(ProfilerObserver()):
            await train(Path(directory))
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(directory) / "trace.json"
        profiled.export_chrome_trace(str(path))
        report(profiled)
        print(f"\n{path.stat().st_size / 1e3:.0f} kB in {path}; open it with https://ui.perfetto.dev")


asyncio.run(main())
