"""What staging from a CUDA device costs, beside its rivals, in one run of under five minutes.

Needs a CUDA device; ``torch_checkpointing`` takes part where it is installed. Every figure is the median of paired
rounds in which the contenders take turns.

    python benchmarks/gpu.py --json gpu.json
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import resource
import statistics
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import events as waiting
import torch
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.staging import StagingOptions as TorchStagingOptions

import aiostage

ROUNDS = 5

Way = Callable[[Any], Awaitable[Any]]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Machine:
    """Where it runs: on a CUDA device, or on the CPU with everything small, to see that it does.

    Attributes:
        device: For tensors.
        gib: What counts as a GiB, in bytes.
        rounds: How many times each way stages after the first.
        features: Of the layers of the model that is trained.
    """

    device: str = "cuda"
    gib: int = 2**30
    rounds: int = ROUNDS
    features: int = 4096

    @property
    def is_real(self) -> bool:
        return self.device == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.is_real else "dry run on the CPU, whose figures mean nothing"

    def synchronize(self) -> None:
        if self.is_real:
            torch.cuda.synchronize()

    def has_room(self, gib: int) -> bool:
        """Return whether the state and its rivals' copies of it fit on the device and the host."""
        if not self.is_real:
            return True
        host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        copies = 2 if gib >= 32 else 4
        return torch.cuda.mem_get_info()[0] > 2.2 * gib * self.gib and host > (copies + 0.5) * gib * self.gib

    def state(self, gib: int) -> dict[str, torch.Tensor]:
        """Return a number of GiB in 64 tensors."""
        return {str(n): torch.zeros(gib * self.gib // 64 // 4, device=self.device) for n in range(64)}

    def forget(self) -> None:
        gc.collect()
        if self.is_real:
            torch.cuda.empty_cache()


async def timed(machine: Machine, way: Way, state: Any) -> float:
    """Return the seconds that one staging takes, from an idle device to bytes on the host."""
    machine.synchronize()
    begin = perf_counter()
    staged = await way(state)
    seconds = perf_counter() - begin
    del staged
    return seconds


async def compare(machine: Machine, name: str, ways: dict[str, Way], state: Any, nbytes: int) -> Rows:
    """Let every way stage once a round, in turns; the first round warms up and does not count, but is reported."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(machine.rounds + 1):
        for label, way in ways.items():
            seconds[label].append(await timed(machine, way, state))
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


def pinned_memcpy(machine: Machine, state: dict[str, torch.Tensor]) -> Way:
    """One big asynchronous copy into pinned memory: the limit."""
    source = torch.empty(sum(tensor.nbytes for tensor in state.values()), dtype=torch.uint8, device=machine.device)
    destination = torch.empty(source.shape, dtype=torch.uint8, pin_memory=machine.is_real)

    async def copy(_: Any) -> None:
        destination.copy_(source, non_blocking=True)
        await asyncio.to_thread(machine.synchronize)

    return copy


@contextmanager
def rivals(machine: Machine) -> Iterator[dict[str, Way]]:
    """Yield the stagers of others, and close them."""
    pinned = machine.is_real
    stagers: dict[str, Any] = {
        "DefaultStager, pinned": DefaultStager(TorchStagingOptions(pinned, False, True, pinned)),
    }
    with suppress(ImportError):
        from torch_checkpointing import staging  # type: ignore[import-not-found]

        config = staging.CheckpointStagerConfig(
            use_pinned_memory=pinned, use_shared_memory=False, use_non_blocking_copy=pinned
        )
        stagers["torch_checkpointing"] = staging.DefaultStager(config)

    def way(stager: Any) -> Way:
        async def stage(state: Any) -> Any:
            return await asyncio.wrap_future(stager.stage(state))

        return stage

    try:
        yield {name: way(stager) for name, stager in stagers.items()}
    finally:
        for stager in stagers.values():
            stager.close()


async def bandwidth(machine: Machine, sizes: list[int]) -> Rows:
    rows: Rows = []
    for gib in sizes:
        if not machine.has_room(gib):
            print(f"{gib} GiB: the device or the host has too little free memory")
            continue
        state = machine.state(gib)
        async with aiostage.AsyncStager() as stager:
            with rivals(machine) as others:
                ways = {"cudaMemcpyAsync, pinned": pinned_memcpy(machine, state), "aiostage": stager.stage}
                if gib < 32:
                    ways |= others
                rows += await compare(machine, f"{gib} GiB in 64 tensors", ways, state, gib * machine.gib)
        del state, ways, others
        machine.forget()
    return rows


async def small_tensors(machine: Machine) -> Rows:
    state = {str(n): torch.zeros(256, device=machine.device) for n in range(10_000)}
    async with aiostage.AsyncStager() as stager:
        with rivals(machine) as others:
            ways: dict[str, Way] = {"aiostage": stager.stage, **others}
            rows = await compare(machine, "10,000 of 1 KiB", ways, state, 10_000 * 1024)
        counts = stager.statistics()
    row = {
        "work": "10,000 of 1 KiB, each staging",
        "copies": counts.copies / counts.stagings,
        "launches": counts.launches / counts.stagings,
    }
    print(f"{row['work']:<30} {row['copies']:.0f} copies, {row['launches']:.0f} device operations")
    return [*rows, row]


async def prewarm(machine: Machine) -> Rows:
    state = machine.state(8)
    async with aiostage.AsyncStager() as stager:
        begin = perf_counter()
        await stager.prewarm(state)
        row = {"work": "prewarm of 8 GiB", "ms": (perf_counter() - begin) * 1e3}
    print(f"{row['work']:<24} {row['ms']:.0f} ms")
    return [row]


async def training_step(machine: Machine) -> Rows:
    """Time a step of forward, backward and optimizer, without staging and with staging in every step."""
    model = torch.nn.Sequential(*(torch.nn.Linear(machine.features, machine.features) for _ in range(24)))
    model.to(machine.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = torch.randn(machine.features, machine.features, device=machine.device)

    def forward_and_backward() -> None:
        model(batch).sum().backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    forward_and_backward()
    step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    rows: Rows = []
    for label, options in (
        ("no limit", aiostage.StagingOptions()),
        ("256 MiB in flight", aiostage.StagingOptions(max_bytes_in_flight=2**28)),
        ("high priority", aiostage.StagingOptions(low_priority_copies=False)),
    ):
        async with aiostage.AsyncStager(options) as stager:
            await stager.prewarm(state)
            alone, beside, blocked = [], [], []
            for _ in range(4 * machine.rounds):
                machine.synchronize()
                begin = perf_counter()
                forward_and_backward()
                step()
                machine.synchronize()
                alone.append(perf_counter() - begin)
                begin = perf_counter()
                async with stager.snapshot(state) as snapshot:
                    entered = perf_counter()
                    forward_and_backward()
                    if machine.is_real:
                        snapshot.order_before()
                    else:
                        await snapshot.captured()
                    step()
                    await asyncio.to_thread(machine.synchronize)
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


async def poller(machine: Machine) -> Rows:
    """Measure processor time while one long transfer is waited for."""
    state = machine.state(8)
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


async def events(machine: Machine) -> Rows:
    """Measure how soon a coroutine runs after a copy is done, and what waiting costs, by every way of waiting."""
    kind = waiting.CudaEvent if machine.is_real else waiting.SimulatedEvent
    measured = await waiting.measure(kind, 0.04, machine.rounds, 0.0003, seed=0)
    rows = [{"work": "waiting for 1 GiB", "way": way, **figures.row()} for way, figures in measured.items()]
    for row in rows:
        print(
            f"{row['work']:<24} {row['way']:<28} median {row['median_us']:.0f} us late, "
            f"{row['core_percent']:.1f} % of a core, {row['most_queries']} queries"
        )
    return rows


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU with small sizes, to see that it works")
    parser.add_argument("--small", action="store_true", help="run on the device with small sizes, to see that it works")
    arguments = parser.parse_args()
    small = {"gib": 2**20, "rounds": 1, "features": 32} if arguments.dry_run or arguments.small else {}
    machine = Machine("cpu" if arguments.dry_run else "cuda", **small)
    if machine.is_real and not torch.cuda.is_available():
        print("PyTorch finds no CUDA device on this machine; --dry-run needs none.", file=sys.stderr)
        return 2
    begin = perf_counter()
    print(f"{machine.name}, torch {torch.__version__}\n")
    print(f"{'work':<24} {'way':<28} {'cold ms':>9} {'warm ms':>9} {'GB/s':>8} {'ratio':>7}")
    rows = await bandwidth(machine, arguments.gib)
    for part in (small_tensors, prewarm, training_step, poller, events):
        rows += await part(machine)
        machine.forget()
    print(f"\n{perf_counter() - begin:.0f} s in all")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": machine.name, "torch": torch.__version__, "rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
