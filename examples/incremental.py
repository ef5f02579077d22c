"""A large tower that is frozen and small adapters that learn: checkpoints that write what has changed.

The same run is saved whole and incrementally; every checkpoint is restored and compared. AIOSTAGE_EXAMPLE_QUICK=1
shrinks the tower from 1 GiB to 16 MiB. It exits with 1 if anything comes back otherwise than it was.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from torch import nn

import aiostage

WIDTH = 256 if os.environ.get("AIOSTAGE_EXAMPLE_QUICK") else 2048
LAYERS = 64
RANK = 4
SAVES = 6


class Adapted(nn.Module):
    """A frozen linear layer, and the low-rank correction of it that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.down = nn.Linear(WIDTH, RANK, bias=False)
        self.up = nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.frozen(x) + self.up(self.down(x)))


async def train(directory: Path, *, incremental: bool) -> bool:
    """Train and save; return whether everything came back."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Adapted() for _ in range(LAYERS)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = torch.rand(8, WIDTH)
    infos, weights = [], {}

    def learn() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

    async with (
        aiostage.AsyncStager() as stager,
        aiostage.Checkpointer(directory, stager, incremental=incremental) as checkpoints,
    ):
        for step in range(SAVES):
            await asyncio.to_thread(learn)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            handle = await checkpoints.save(step, state)
            infos.append(await handle.committed())
            weights[step] = [layer.up.weight.detach().clone() for layer in model]
    size, later = infos[0].nbytes, infos[1:]
    print(
        f"{'incremental' if incremental else 'whole':<12} {size / 2**20:>6.0f} MiB"
        f" {infos[0].written_bytes / 2**20:>9.0f} MiB {median(i.written_bytes for i in later) / 2**20:>9.0f} MiB"
        f" {median(i.captured for i in later) * 1e3:>9.0f} ms {median(i.committed for i in later) * 1e3:>9.0f} ms"
    )
    same = True
    for step, expected in weights.items():
        found = (await checkpoints.restore(step=step))["model"]
        same &= all(torch.equal(found[f"{n}.up.weight"], weight) for n, weight in enumerate(expected))
        same &= all(torch.equal(found[f"{n}.frozen.weight"], layer.frozen.weight) for n, layer in enumerate(model))
    return same


async def main() -> bool:
    print(f"{'saved':<12} {'state':>10} {'first writes':>13} {'later ones':>13} {'captured':>12} {'committed':>12}")
    with tempfile.TemporaryDirectory() as folder:
        same = [await train(Path(folder) / str(incremental), incremental=incremental) for incremental in (False, True)]
    print("\nevery checkpoint comes back as it was:", "yes" if all(same) else "NO")
    return all(same)


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(main()) else 1)
