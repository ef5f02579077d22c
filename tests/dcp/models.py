"""Models in every kind of parallelism, built and trained the same on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from aiostage import AsyncStager, dcp

KINDS = ["plain", "ddp", "fsdp", "hsdp", "tensor-parallel"]
TIMEOUT = 40.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Embeddings tied to the head, blocks, a buffer; one parameter that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.odd = nn.Parameter(torch.randn(7, 3))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += len(tokens)  # type: ignore[has-type]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) + self.odd.sum().to(x.dtype)


def build(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = Model()
    size = dist.get_world_size()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh("cpu", (size,))
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    elif kind == "hsdp":
        replicas = 2 if size > 2 else 1
        mesh = init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "tensor-parallel":
        parallel = 2 if size > 1 else 1
        mesh = init_device_mesh("cpu", (size // parallel, parallel), mesh_dim_names=("data", "tensor"))
        for block in model.blocks:  # type: ignore[union-attr]
            parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        tokens = torch.randint(0, 32, (8,))
        loss = nn.functional.cross_entropy(model(tokens).float(), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, **options: bool) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    return {"model": weights, "optimizer": moments}


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the unsharded state, gathered by PyTorch, on rank 0."""
    return state_of(model, optimizer, full_state_dict=True, cpu_offload=True)


async def saved(kind: str, path: str) -> bool:
    """Train, save, and write down the unsharded state beside it. Training goes on while the save is written."""
    model, optimizer = build(kind, seed=1)
    train(model, optimizer, 2)
    reference = whole(model, optimizer)
    if dist.get_rank() == 0:
        # At once: where nothing is sharded, it is the live tensors.
        torch.save(reference, f"{path}.reference")
    async with AsyncStager() as stager:
        saving = dcp.start_save(state_of(model, optimizer), checkpoint_id=path, stager=stager, timeout=TIMEOUT)
        await saving.captured()
        train(model, optimizer, 1)
        await saving.committed()
    dist.barrier()
    return True


async def differences(kind: str, path: str, plainly: bool = False) -> list[str]:
    """Load into a fresh model, and return where its unsharded state differs from what was written down."""
    model, optimizer = build(kind, seed=2)
    into = state_of(model, optimizer)
    if plainly:
        dist.checkpoint.load(into, checkpoint_id=path)
    else:
        await dcp.load(into, checkpoint_id=path, timeout=TIMEOUT)
    set_state_dict(model, optimizer, model_state_dict=into["model"], optim_state_dict=into["optimizer"])
    loaded = whole(model, optimizer)
    if dist.get_rank() != 0:
        return []
    return list(compare(torch.load(f"{path}.reference"), loaded, ""))


def compare(reference: Any, loaded: Any, path: str) -> Any:
    if isinstance(reference, dict):
        if sorted(map(str, reference)) != sorted(map(str, loaded)):
            yield f"{path}: {sorted(map(str, reference))} against {sorted(map(str, loaded))}"
        for key in reference.keys() & loaded.keys():
            yield from compare(reference[key], loaded[key], f"{path}.{key}")
    elif isinstance(reference, list):
        for number, (one, other) in enumerate(zip(reference, loaded, strict=True)):
            yield from compare(one, other, f"{path}[{number}]")
    elif isinstance(reference, torch.Tensor):
        if reference.dtype != loaded.dtype or not torch.equal(reference, loaded):
            yield path
    elif reference != loaded:
        yield f"{path}: {reference} against {loaded}"
