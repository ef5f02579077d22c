"""Every kind of leaf follows a stream of the user's, to the host and back, awaited where another is current."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage import AsyncStager, StagingOptions

pytestmark = [pytest.mark.asyncio, pytest.mark.one_loop]

DEVICE, OTHER = "simgpu:0", "simgpu:1"
OLD, LATE = 1.0, 7.0
LATE_MICROSECONDS = 15_000

Leaves = list[torch.Tensor]


def full(*size: int, device: str = DEVICE, **options: Any) -> torch.Tensor:
    return torch.full(size, OLD, device=device, **options)


def with_gradient() -> Leaves:
    parameter = torch.nn.Parameter(full(6))
    parameter.grad = full(6)
    return [parameter]


def of_one_storage() -> Leaves:
    base = full(100)
    return [base[:10], base[5:20], base[30:]]


SPARSE = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2), (3,), check_invariants=True)

KINDS: dict[str, Callable[[], Leaves]] = {
    "small": lambda: [full(6) for _ in range(4)],
    "large": lambda: [full(60_000), full(3, 50_000)],
    "transposed": lambda: [full(8, 6).t() for _ in range(4)],
    "large transposed": lambda: [full(300, 200).t()],
    "strided": lambda: [full(16, 6)[::2] for _ in range(4)],
    "large strided": lambda: [full(600, 200)[:, ::3]],
    "channels last": lambda: [full(2, 3, 4, 5).to(memory_format=torch.channels_last)],
    "expanded": lambda: [full(1, 6).expand(5, 6)],
    "of one storage": of_one_storage,
    "negative": lambda: [torch._neg_view(full(6)) for _ in range(3)],
    "conjugate": lambda: [full(6, dtype=torch.complex64).conj() for _ in range(3)],
    "half": lambda: [full(60, dtype=torch.float16) for _ in range(4)],
    "gradient": with_gradient,
    "two devices": lambda: [full(6), full(6, device=OTHER)],
    "sparse": lambda: [SPARSE.to(DEVICE)],
}


def memory_of(leaf: torch.Tensor) -> torch.Tensor:
    """Return the memory of a leaf, to write to and to read from."""
    leaf = leaf.detach()
    if leaf.is_sparse:
        return leaf._values()
    return torch.empty(0, dtype=leaf.dtype, device=leaf.device).set_(leaf.untyped_storage())


def values_of(leaves: Leaves) -> set[float]:
    """Return what is in the memory of leaves, which of a negative one is not its values."""
    return {abs(complex(value).real) for leaf in leaves for value in memory_of(leaf).cpu().tolist()}


@contextmanager
def late_write(leaves: Leaves) -> Iterator[None]:
    """Make streams of the user's current, on which writes to all memory wait to be carried out."""
    before = {leaf.device: torch.accelerator.current_stream(leaf.device) for leaf in leaves}
    for device, stream in before.items():
        mine = torch.Stream(device)
        mine.wait_stream(stream)
        torch.accelerator.set_stream(mine)
        torch.simgpu.sleep(LATE_MICROSECONDS, device.index)  # type: ignore[attr-defined]
    for leaf in leaves:
        for tensor in filter(lambda it: it is not None, (leaf, leaf.grad)):
            memory_of(tensor).fill_(LATE)
    try:
        yield
    finally:
        for stream in before.values():
            torch.accelerator.set_stream(stream)
        torch.accelerator.set_device_index(0)


@pytest.mark.parametrize(
    "options",
    [
        StagingOptions(),
        StagingOptions(max_loop_hold=1e-9),
        StagingOptions(dtype=torch.float64),
        StagingOptions(use_non_blocking_copy=False),
        StagingOptions(use_async_staging=False),
    ],
    ids=["default", "in steps", "cast", "blocking copy", "inline"],
)
async def test_are_staged_as_they_are_written_before_the_call(options: StagingOptions) -> None:
    for kind, make in KINDS.items():
        leaves = make()
        torch.simgpu.drain()  # type: ignore[attr-defined]
        async with AsyncStager(options) as stager:
            with late_write(leaves):
                staging = stager.stage({"leaves": leaves, "more": list(range(300))})
            staged = (await staging)["leaves"]
        assert values_of(staged) == {LATE}, kind
        assert all(leaf.grad is None or leaf.grad.tolist() == [LATE] * 6 for leaf in staged), kind


@pytest.mark.parametrize("way", ["restore", "load", "load in place"])
async def test_are_written_after_what_is_written_before_the_call(way: str, tmp_path: Path) -> None:
    for kind, make in KINDS.items():
        leaves = make()
        torch.simgpu.drain()  # type: ignore[attr-defined]
        if kind == "sparse" and way != "restore":
            continue  # cannot be loaded into
        async with AsyncStager() as stager:
            staged = await stager.stage(leaves)
            await aiostage.save(staged, tmp_path / kind)
            with late_write(leaves):
                if way == "restore":
                    writing = stager.restore(staged, into=leaves)
                else:
                    writing = aiostage.load(tmp_path / kind, into=leaves, in_place=way == "load in place")
            await writing
        torch.simgpu.drain()  # type: ignore[attr-defined]
        assert {value for leaf in leaves for value in elements_of(leaf)} == {OLD}, kind


def elements_of(leaf: torch.Tensor) -> list[float]:
    """Return the elements of a leaf, and not what lies between those of a strided one."""
    memory = memory_of(leaf)
    if not leaf.is_sparse:
        memory = torch.as_strided(memory, leaf.shape, leaf.stride(), leaf.storage_offset())
    return [complex(value).real for value in memory.cpu().reshape(-1).tolist()]
