"""Sharded training with FSDP that saves from an event loop, and a load on another number of processes.

torchrun --nproc-per-node 4 examples/distributed.py
python examples/distributed.py            # starts two processes by itself
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import aiostage
from aiostage import dcp

STEPS = 20 if os.environ.get("AIOSTAGE_EXAMPLE_QUICK") else 200
SAVE_EVERY = STEPS // 4
TIMEOUT = 60.0


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    torch.manual_seed(1000 * step + dist.get_rank())
    data = torch.randn(32, 64)
    loss = (model(data) - data).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, object]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": step}


async def train(folder: Path) -> None:
    rank = dist.get_rank()
    model, optimizer = build()
    responses: list[dcp.AsyncSaveResponse] = []
    async with aiostage.AsyncStager() as stager:
        for step in range(1, STEPS + 1):
            # The step blocks, so it goes to a thread; the loop stays free for everything else.
            loss = await asyncio.to_thread(train_step, model, optimizer, step)
            if step % SAVE_EVERY == 0:
                state = state_of(model, optimizer, step)
                response = dcp.start_save(state, checkpoint_id=folder / f"step-{step}", stager=stager, timeout=TIMEOUT)
                # All that training waits for. Planning, writing and the collectives of DCP go on beside it.
                await response.captured()
                responses.append(response)
                if rank == 0:
                    print(f"step {step}: loss {loss:.4f}, captured")
        for response in responses:
            metadata = await response.committed()
        responses.clear()
        if rank == 0:
            print(f"{len(metadata.state_dict_metadata)} entries in each checkpoint of {dist.get_world_size()} ranks")

        # Resume: another model, filled in place, each rank reading its shards.
        resumed, its_optimizer = build()
        into = state_of(resumed, its_optimizer, 0)
        await dcp.load(into, checkpoint_id=folder / f"step-{STEPS}", timeout=TIMEOUT)
        set_state_dict(resumed, its_optimizer, model_state_dict=into["model"], optim_state_dict=into["optimizer"])  # type: ignore[arg-type]
        assert into["step"] == STEPS
        for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(ours.to_local(), theirs.to_local())  # type: ignore[attr-defined]

        # Into a storage, where it replaces the one of before in one step: a directory here, s3://bucket/run elsewhere.
        writer = dcp.StorageWriter(folder / "storage", overwrite=True)
        for _ in range(2):
            await dcp.save(into, checkpoint_id="latest", storage_writer=writer, stager=stager, timeout=TIMEOUT)
        reader = dcp.StorageReader(folder / "storage")
        await dcp.load(into, checkpoint_id="latest", storage_reader=reader, timeout=TIMEOUT)

        # PyTorch's own saver with our staging: one argument.
        torch_stager = dcp.TorchStager()
        response = checkpoint.async_save(into, checkpoint_id=folder / "by-pytorch", async_stager=torch_stager)
        await asyncio.wrap_future(response.upload_completion)  # type: ignore[union-attr]
        torch_stager.close()

        # When a rank cannot save, all are told which and why, and the next save works.
        broken: dict[str, object] = {"weights": torch.ones(1)}
        if rank == dist.get_world_size() - 1:
            broken["bad"] = torch.ones(1, device="meta")
        try:
            await dcp.save(broken, checkpoint_id=folder / "broken", stager=stager, timeout=TIMEOUT)
        except aiostage.RankFailedError as error:
            print(f"rank {rank} is told: ranks {sorted(error.failures)} failed")
        except aiostage.UnsupportedLeafError as error:
            print(f"rank {rank} knows: {error.path}")
    await dcp.close()


def main() -> None:
    if "RANK" not in os.environ:
        # As torchrun would: python -m torch.distributed.run --nproc-per-node 2 examples/distributed.py
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"AIOSTAGE_EXAMPLE_FOLDER": folder, "OMP_NUM_THREADS": "1"}
            sys.exit(subprocess.run([sys.executable, "-m", *command], env=environment, check=False).returncode)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    folder = os.environ.get("AIOSTAGE_EXAMPLE_FOLDER", "distributed-checkpoints")
    try:
        asyncio.run(train(Path(folder)))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
