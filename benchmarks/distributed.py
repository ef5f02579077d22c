"""What a distributed save and load cost on 1 to 8 processes, beside plain DCP: run by `make bench-distributed`.

Each rank holds its share of a sharded state of fixed size a rank (weak scaling), on one machine, so that processors and
disk are shared by all ranks: what grows here is the work of the machine; the bytes and collectives of a rank
are counted, and do not depend on the machine.

The floor is `dcp.save` in a thread beside a loop that does nothing but tick: PyTorch's planner, pickles, collectives
and writes, and no code of aiostage. What calls them in a thread holds the loop at least as long. All ways run once more
after `gc.freeze()`, as the documents advise trainers, which takes the objects of the imports from the collector.

A full run of the collector takes as long as a save of one process. Python starts it about once in six saves, in
whichever way comes then, and where ways take turns in a fixed order it can be the same way each time. So it is run
before each turn that is measured by the clock, the order of the turns is random, and what it costs is measured in saves
of one way in a row. Files that wait to be written are synced before each turn.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import pickle
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from compare import interval
from steps import Steps
from torch.distributed import checkpoint
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from aiostage import AsyncStager, dcp

SIZES = (1, 2, 4, 8)
TIMEOUT = 120.0
ROUNDS = {1: 15, 2: 13, 4: 9, 8: 9}
"""By processes."""

IN_A_ROW = {1: 36, 2: 18}
"""By processes, saves of one way in a row, 12 of more processes: some six full runs of the collector in all ranks."""

OURS, PYTORCH, FLOOR = "aiostage.dcp.save", "dcp.async_save", "PyTorch's dcp.save in a thread"
LOADS = "aiostage.dcp.load", "dcp.load"
HELD_LIMIT = 5.0


class Loop:
    """How late a 1 ms ticker runs, in milliseconds, and how late it is beside the wait for a processor.

    What other processes and threads do to the loop is no work on it: while the loop's thread could run and had no
    processor, the kernel counts. What is left is what ran on the loop, and waits for the GIL.
    """

    def __init__(self) -> None:
        self.worst = self.worst_with_a_processor = 0.0

    async def __aenter__(self) -> Loop:
        self._task = asyncio.create_task(self._tick())
        await asyncio.sleep(0.005)
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.sleep(0.005)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _tick(self) -> None:
        with processor_waits() as waits:
            begin, waited = time.perf_counter(), waits()
            while True:
                await asyncio.sleep(0.001)
                now, waited_now = time.perf_counter(), waits()
                late = (now - begin - 0.001) * 1000
                self.worst = max(self.worst, late)
                self.worst_with_a_processor = max(self.worst_with_a_processor, late - (waited_now - waited) * 1000)
                begin, waited = now, waited_now


@contextmanager
def processor_waits() -> Generator[Callable[[], float], None, None]:
    """Yield what tells how many seconds this thread could run and had no processor; 0 where the kernel does not say."""
    try:
        file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    except OSError:
        yield lambda: 0.0
        return
    try:
        yield lambda: int(os.pread(file, 100, 0).split()[1]) / 1e9
    finally:
        os.close(file)


def settle() -> None:
    """Bring all ranks to the same start of a turn, in which none pays for what came before."""
    gc.collect()
    dist.barrier()
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()


class FullRuns:
    """CPU seconds of each full run of the collector, in whatever thread."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    @contextmanager
    def counted(self) -> Generator[None, None, None]:
        """Count those within the block."""
        gc.callbacks.append(self._collect)
        try:
            yield
        finally:
            gc.callbacks.remove(self._collect)

    def _collect(self, phase: str, about: dict[str, int]) -> None:
        if about["generation"] == 2:
            if phase == "start":
                self._begun = time.thread_time()
            else:
                self.seconds.append(time.thread_time() - self._begun)


def sharded_state(tensors: int, bytes_a_rank: int) -> dict[str, DTensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = bytes_a_rank // tensors // 4 // 256
    return {
        f"layers.{number}.weight": DTensor.from_local(torch.randn(rows, 256), mesh, [Shard(0)], run_check=False)
        for number in range(tensors)
    }


class Counted:
    """Counts the object collectives of DCP and the bytes that this rank gives to them."""

    NAMES = ("gather_object", "scatter_object_list", "broadcast_object_list", "all_gather_object", "barrier")

    def __enter__(self) -> Counted:
        self.calls: dict[str, int] = dict.fromkeys(self.NAMES, 0)
        self.nbytes = 0
        self._kept = {name: getattr(dist, name) for name in self.NAMES}
        for name in self.NAMES:
            setattr(dist, name, self._counting(name, self._kept[name]))
        return self

    def __exit__(self, *error: object) -> None:
        for name, function in self._kept.items():
            setattr(dist, name, function)

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls[name] += 1
            given = {
                "gather_object": lambda: keywords.get("obj"),
                "scatter_object_list": lambda: keywords.get("scatter_object_input_list"),
                "broadcast_object_list": lambda: keywords.get("object_list"),
                "all_gather_object": lambda: keywords.get("obj"),
                "barrier": lambda: None,
            }[name]()
            self.nbytes += len(pickle.dumps(given)) if given is not None else 0
            return function(*arguments, **keywords)

        return call


def whole_job(seconds: float, op: Any = dist.ReduceOp.MAX) -> float:
    """Of the slowest rank, or of all together."""
    value = torch.tensor(seconds)
    dist.all_reduce(value, op=op)
    return value.item()


async def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    state = sharded_state(arguments.tensors, arguments.megabytes << 20)
    found: dict[str, list[float]] = {}
    number = 0

    def keep(name: str, what: str, value: float, op: Any = dist.ReduceOp.MAX) -> None:
        found.setdefault(f"{name}: {what}", []).append(whole_job(value, op))

    async def timed(name: str, action: Callable[[Path], Any]) -> None:
        settle()
        with placed(name) as place:
            begin, used = time.perf_counter(), time.process_time()
            blocked = await action(place)
            seconds, used = time.perf_counter() - begin, time.process_time() - used
            # Only now, because it blocks.
            keep(name, "total, s", seconds)
            keep(name, "training waits, s", seconds if blocked is None else blocked)
            keep(name, "CPU of all ranks, s", used, dist.ReduceOp.SUM)

    async def in_a_row(name: str, action: Callable[[Path], Any]) -> None:
        """Save as a training does, with the collector's full runs."""
        settle()
        collector, used, saves = FullRuns(), 0.0, IN_A_ROW.get(dist.get_world_size(), 12)
        for _ in range(saves):
            with placed(name) as place, collector.counted():
                before = time.process_time()
                await action(place)
                used += time.process_time() - before
        keep(name, "CPU of all ranks, saves in a row, s", used / saves, dist.ReduceOp.SUM)
        keep(name, "of it the collector's full runs, s", sum(collector.seconds) / saves, dist.ReduceOp.SUM)
        runs = len(collector.seconds) / saves / dist.get_world_size()
        keep(name, "full runs of the collector, a save", runs, dist.ReduceOp.SUM)

    async def held(name: str, action: Callable[[Path], Any], when: str = "") -> None:
        """Once more with a ticker, which takes a tenth of a core in each process that it can run in."""
        with placed(name) as place:
            steps = Steps()
            async with Loop() as loop:
                with steps.counted():
                    await asyncio.create_task(action(place))
            keep(name, f"loop held{when}, ms", loop.worst)
            keep(name, f"loop held while it had a processor{when}, ms", loop.worst_with_a_processor)
            # What holds the loop and is neither another process nor another thread: the CPU time of the longest step,
            # and the longest run of the collector, which is in one of the steps or in a thread.
            keep(name, f"longest step{when}, ms of CPU", 1000 * max(steps.seconds, default=0.0))
            collected = max((seconds for _, seconds in steps.collected), default=0.0)
            keep(name, f"longest run of the collector{when}, ms of CPU", 1000 * collected)

    @contextmanager
    def placed(name: str) -> Generator[Path, None, None]:
        """Where to save, removed at the end; all ranks begin and end together."""
        nonlocal number
        number += 1
        place = folder / f"{name.replace(' ', '-')}-{number}"
        dist.barrier()
        yield place
        dist.barrier()
        if dist.get_rank() == 0 and place.exists():
            shutil.rmtree(place)

    stager = AsyncStager()
    before = descriptors()
    await dcp.save({"a": torch.ones(1)}, checkpoint_id=folder / "first", timeout=TIMEOUT)
    opened = descriptors() - before

    async def ours(place: Path) -> float:
        begin = time.perf_counter()
        saving = dcp.start_save(
            dict(state), storage_writer=FileSystemWriter(place, sync_files=False), stager=stager, timeout=TIMEOUT
        )
        await saving.captured()
        blocked = time.perf_counter() - begin
        await saving.committed()
        return blocked

    async def plain(place: Path) -> None:
        checkpoint.save(dict(state), storage_writer=FileSystemWriter(place, sync_files=False))

    async def torch_async(place: Path) -> float:
        begin = time.perf_counter()
        future = checkpoint.async_save(dict(state), storage_writer=FileSystemWriter(place, sync_files=False))
        blocked = time.perf_counter() - begin
        await asyncio.wrap_future(future)  # type: ignore[arg-type]
        return blocked

    async def alone(place: Path) -> None:
        await asyncio.to_thread(checkpoint.save, dict(state), storage_writer=FileSystemWriter(place, sync_files=False))

    ways = [(OURS, ours), ("dcp.save", plain), (PYTORCH, torch_async), (FLOOR, alone)]
    # All ranks draw the same. What comes after async_save, which gives its memory back, pays for more than itself.
    chance = random.Random(0)

    def in_any_order() -> list[tuple[str, Callable[[Path], Any]]]:
        return chance.sample(ways, len(ways))

    # The first rounds make groups and memory.
    for round_number in range(arguments.rounds + 1):
        for name, action in in_any_order():
            await timed(name, action)
        if round_number == 0:
            found.clear()
    await in_a_row(PYTORCH, torch_async)
    await in_a_row(OURS, ours)
    for _ in range(arguments.rounds // 2 + 1):
        for name, action in in_any_order():
            await held(name, action)
    gc.collect()
    gc.freeze()
    for _ in range(arguments.rounds // 2 + 1):
        for name, action in in_any_order():
            await held(name, action, " after gc.freeze()")
    gc.unfreeze()

    place = folder / "kept"
    await dcp.save(dict(state), storage_writer=FileSystemWriter(place, sync_files=False), timeout=TIMEOUT)
    into = {key: tensor.clone() for key, tensor in state.items()}
    for _ in range(arguments.rounds):
        for name in chance.sample(LOADS, len(LOADS)):
            settle()
            begin, used = time.perf_counter(), time.process_time()
            if name == "dcp.load":
                checkpoint.load(into, checkpoint_id=place)
            else:
                await dcp.load(into, checkpoint_id=place, timeout=TIMEOUT)
            seconds, used = time.perf_counter() - begin, time.process_time() - used
            keep(name, "total, s", seconds)
            keep(name, "CPU of all ranks, s", used, dist.ReduceOp.SUM)

    counts: dict[str, Any] = {}
    for caching in (False, True):
        for _ in range(2):
            planner = DefaultSavePlanner(enable_plan_caching=caching)
            writer = FileSystemWriter(folder / f"counted-{caching}", sync_files=False)
            with Counted() as counted, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                begin = time.perf_counter()
                await dcp.save(dict(state), storage_writer=writer, planner=planner, stager=stager, timeout=TIMEOUT)
                seconds = time.perf_counter() - begin
        name = "with plan caching, second save" if caching else "without plan caching"
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, counted.nbytes)
        counts[name] = {
            "collectives": sum(counted.calls.values()),
            "bytes sent by rank 0": everybody[0],
            "bytes sent by the last rank": everybody[-1],
            "seconds": seconds,
        }
    counts["metadata bytes"] = (place / ".metadata").stat().st_size
    counts["metadata bytes a shard"] = counts["metadata bytes"] // arguments.tensors // dist.get_world_size()
    counts["descriptors that the first save opens"] = opened
    await dcp.close()
    counts["peak memory, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    await stager.aclose()
    gc.collect()
    times = {name: round(statistics.median(values), 4) for name, values in found.items()}
    return {"times": times, "targets": targets(found), "counts": counts, "rounds": arguments.rounds}


def targets(found: dict[str, list[float]]) -> dict[str, float | str]:
    """Return the figures that have a target, each ratio the median of those of the rounds."""
    shown: dict[str, float | str] = {}

    def ratio(label: str, ours: str, theirs: str, what: str, limit: str = "") -> None:
        pairs = zip(found[f"{ours}: {what}"], found[f"{theirs}: {what}"], strict=True)
        ratios = [mine / other for mine, other in pairs]
        shown[f"{label}{limit}"] = round(statistics.median(ratios), 2)
        if len(ratios) > 1:
            shown[f"{label}: interval of 95 %"] = "{:.2f} to {:.2f}".format(*interval(ratios))

    limit, cpu = ", at most 1", "CPU of all ranks"
    ratio("until committed / `dcp.async_save`", OURS, PYTORCH, "total, s", limit)
    ratio("CPU / `dcp.async_save`", OURS, PYTORCH, f"{cpu}, s")
    ratio("CPU, saves in a row / `dcp.async_save`", OURS, PYTORCH, f"{cpu}, saves in a row, s")
    ratio("training waits / `dcp.async_save`", OURS, PYTORCH, "training waits, s")
    ratio("until committed / the floor", OURS, FLOOR, "total, s")
    ratio("load / `dcp.load`", *LOADS, "total, s", limit)
    ratio("CPU of a load / `dcp.load`", *LOADS, f"{cpu}, s")
    for when in ("", " after gc.freeze()"):
        for what, label in (
            ("loop held", "loop held, ms"),
            ("loop held while it had a processor", "of it while it had a processor, ms"),
        ):
            ours, floor = (statistics.median(found[f"{name}: {what}{when}, ms"]) for name in (OURS, FLOOR))
            limit = f", at most {HELD_LIMIT:g}" if what == "loop held" else ""
            shown[f"{label}{when}{limit}"] = round(ours, 1)
            shown[f"{label}{when}: the floor"] = round(floor, 1)
        step = statistics.median(found[f"{OURS}: longest step{when}, ms of CPU"])
        shown[f"longest step on the loop, ms of CPU{when}"] = round(step, 1)
    return shown


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def rank(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    result = asyncio.run(measure(arguments, Path(arguments.folder)))
    if dist.get_rank() == 0:
        print(json.dumps({"processes": dist.get_world_size()} | result), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64, help="of state for each rank")
    parser.add_argument("--tensors", type=int, default=200, help="of which each rank has a shard")
    parser.add_argument("--rounds", type=int, help=f"by default, by processes: {ROUNDS}")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank(arguments)
        return
    rows = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(prefix="aiostage-bench-") as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
            command += [__file__, "--folder", folder, "--megabytes", str(arguments.megabytes)]
            rounds = arguments.rounds or ROUNDS.get(size, 3)
            command += ["--tensors", str(arguments.tensors), "--rounds", str(rounds)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
    rounds_of = ", ".join(str(row["rounds"]) for row in rows)
    print(f"{arguments.tensors} tensors, {arguments.megabytes} MiB a rank; medians of {rounds_of} rounds.")
    print(
        "The floor is PyTorch's `dcp.save` in a thread beside a loop that only ticks: its planner, pickles, "
        "collectives and writes, and no code of aiostage."
    )
    print_table("targets", rows, lambda row: row["targets"])
    print_table("", rows, lambda row: row["times"])
    for name in ("without plan caching", "with plan caching, second save"):
        print_table(name, rows, lambda row, name=name: row["counts"][name])
    rest = [key for key in rows[0]["counts"] if not isinstance(rows[0]["counts"][key], dict)]
    print_table("", rows, lambda row: {key: row["counts"][key] for key in rest})


def print_table(title: str, rows: list[dict[str, Any]], pick: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    print(f"\n| {title or 'processes'} | " + " | ".join(str(row["processes"]) for row in rows) + " |")
    print("| --- |" + " ---: |" * len(rows))
    for name in pick(rows[0]):
        values = [pick(row)[name] for row in rows]
        print(
            f"| {name} | "
            + " | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values)
            + " |"
        )


if __name__ == "__main__":
    main()
