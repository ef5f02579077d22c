"""What staging from a CUDA device costs, beside its rivals, in one run of under five minutes.

Needs a CUDA device; ``torch_checkpointing`` takes part where it is installed. Every figure is the median of paired
rounds in which the contenders take turns.

    python benchmarks/gpu.py --json gpu.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import sys
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.staging import StagingOptions as TorchStagingOptions

import aiostage

GIB = 2**30
DEVICE = "cuda"
ROUNDS = 5

Way = Callable[[Any], Awaitable[Any]]
Rows = list[dict[str, Any]]


async def timed(way: Way, state: Any) -> float:
    """Return the seconds that one staging takes, from an idle device to bytes on the host."""
    torch.cuda.synchronize()
    begin = perf_counter()
    staged = await way(state)
    seconds = perf_counter() - begin
    del staged
    return seconds


async def compare(name: str, ways: dict[str, Way], state: Any, nbytes: int) -> Rows:
    """Let every way stage once a round, in turns; the first round warms up and does not count, but is reported."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS + 1):
        for label, way in ways.items():
            seconds[label].append(await timed(way, state))
    rows = []
    for label, (cold, *warm) in seconds.items():
        ratios = [mine / limit for mine, limit in zip(warm, seconds[next(iter(ways))][1:], strict=True)]
        median = statistics.median(warm)
        rows.append(
            {
                "work": name,
                "way": label,
                "cold_ms": cold * 1e3,
                "warm_ms": median * 1e3,
                "warm_gb_s": nbytes / median / 1e9,
                "ratio_to_first": statistics.median(ratios),
            }
        )
        print(
            "{work:<24} {way:<28} {cold_ms:>9.1f} {warm_ms:>9.1f} {warm_gb_s:>8.1f} {ratio_to_first:>7.2f}".format(
                **rows[-1]
            )
        )
    return rows


def pinned_memcpy(state: dict[str, torch.Tensor]) -> Way:
    """One big asynchronous copy into pinned memory: the limit."""
    source = torch.empty(sum(tensor.nbytes for tensor in state.values()), dtype=torch.uint8, device=DEVICE)
    destination = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)

    async def copy(_: Any) -> None:
        destination.copy_(source, non_blocking=True)
        await asyncio.to_thread(torch.cuda.synchronize)

    return copy


def default_stager() -> Way:
    stager = DefaultStager(TorchStagingOptions(True, False, True, True))

    async def stage(state: Any) -> Any:
        return await asyncio.wrap_future(stager.stage(state))  # type: ignore[arg-type]

    return stage


def torch_checkpointing_stager() -> Way | None:
    try:
        from torch_checkpointing import staging  # type: ignore[import-not-found]
    except ImportError:
        return None
    stager = staging.DefaultStager(staging.CheckpointStagerConfig(use_shared_memory=False))

    async def stage(state: Any) -> Any:
        return await asyncio.wrap_future(stager.stage(state))

    return stage


async def bandwidth(sizes: list[int]) -> Rows:
    rows: Rows = []
    for gib in sizes:
        if torch.cuda.mem_get_info()[0] < 2.5 * gib * GIB:
            print(f"{gib} GiB: the device has too little free memory")
            continue
        state = {str(n): torch.zeros(gib * GIB // 64 // 4, device=DEVICE) for n in range(64)}
        async with aiostage.AsyncStager() as stager:
            ways = {"cudaMemcpyAsync, pinned": pinned_memcpy(state), "aiostage": stager.stage}
            if gib < 32:
                ways["DefaultStager, pinned"] = default_stager()
                rival = torch_checkpointing_stager()
                if rival is not None:
                    ways["torch_checkpointing"] = rival
            rows += await compare(f"{gib} GiB in 64 tensors", ways, state, gib * GIB)
        del state, ways
        torch.cuda.empty_cache()
    return rows


async def small_tensors() -> Rows:
    state = {str(n): torch.zeros(256, device=DEVICE) for n in range(10_000)}
    async with aiostage.AsyncStager() as stager:
        ways: dict[str, Way] = {"aiostage": stager.stage, "DefaultStager, pinned": default_stager()}
        return await compare("10,000 of 1 KiB", ways, state, 10_000 * 1024)


async def prewarm() -> Rows:
    state = {str(n): torch.zeros(8 * GIB // 64 // 4, device=DEVICE) for n in range(64)}
    async with aiostage.AsyncStager() as stager:
        begin = perf_counter()
        await stager.prewarm(state)
        row = {"work": "prewarm of 8 GiB", "ms": (perf_counter() - begin) * 1e3}
    print(f"{row['work']:<24} {row['ms']:.0f} ms")
    return [row]


async def training_step() -> Rows:
    """Time a step of forward, backward and optimizer, without staging and with staging in every step."""
    model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096) for _ in range(24))).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = torch.randn(4096, 4096, device=DEVICE)

    def forward_and_backward() -> None:
        model(batch).sum().backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    forward_and_backward()
    step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    rows: Rows = []
    for label, limit in (("no limit", None), ("256 MiB in flight", 2**28)):
        async with aiostage.AsyncStager(aiostage.StagingOptions(max_bytes_in_flight=limit)) as stager:
            await stager.prewarm(state)
            alone, beside, blocked = [], [], []
            for _ in range(4 * ROUNDS):
                torch.cuda.synchronize()
                begin = perf_counter()
                forward_and_backward()
                step()
                torch.cuda.synchronize()
                alone.append(perf_counter() - begin)
                begin = perf_counter()
                async with stager.snapshot(state) as snapshot:
                    entered = perf_counter()
                    forward_and_backward()
                    snapshot.order_before()
                    step()
                    await asyncio.to_thread(torch.cuda.synchronize)
                    beside.append(perf_counter() - begin)
                    blocked.append(entered - begin)
                    await snapshot.captured()
        row = {
            "work": f"training step, {label}",
            "alone_ms": statistics.median(alone) * 1e3,
            "staging_ms": statistics.median(beside) * 1e3,
            "entering_ms": statistics.median(blocked) * 1e3,
            "ratio": statistics.median(b / a for a, b in zip(alone, beside, strict=True)),
        }
        print(
            f"{row['work']:<40} alone {row['alone_ms']:.1f} ms, staging every step {row['staging_ms']:.1f} ms "
            f"({row['ratio']:.3f} x), entering {row['entering_ms']:.1f} ms"
        )
        rows.append(row)
    return rows


async def poller() -> Rows:
    """Processor time for waiting for one long transfer."""
    state = {str(n): torch.zeros(8 * GIB // 64 // 4, device=DEVICE) for n in range(64)}
    async with aiostage.AsyncStager() as stager:
        for _ in range(3):
            await stager.stage(state)
        async with stager.snapshot(state) as snapshot:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            begin = perf_counter()
            await snapshot.captured()
            wall = perf_counter() - begin
            after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    row = {"work": "waiting for 8 GiB", "wall_ms": wall * 1e3, "core_percent": 100 * used / wall}
    print(f"{row['work']:<24} {row['wall_ms']:.0f} ms, {row['core_percent']:.1f} % of a core")
    return [row]


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--json", help="where to write the figures")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch finds no CUDA device on this machine.", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print(f"{'work':<24} {'way':<28} {'cold ms':>9} {'warm ms':>9} {'GB/s':>8} {'ratio':>7}")
    rows = await bandwidth(arguments.gib)
    for part in (small_tensors, prewarm, training_step, poller):
        rows += await part()
        torch.cuda.empty_cache()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(
                {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, file, indent=1
            )
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
