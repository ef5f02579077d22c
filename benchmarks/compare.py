"""Compare two commits, in turns, and say where they differ by more than the noise.

    python benchmarks/compare.py v0.1.0                    against what the working tree has
    python benchmarks/compare.py v0.1.0 main --pairs 15    two commits

Each pair runs both commits on the same work, each in a process of its own, in random order. A pair gives one ratio; the
table has the median of them with its interval of 95 % by bootstrap. An interval that does not hold 1 is a difference.
CPU time is that of all threads. On a busy machine it can be trusted sooner than time that has passed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from delays import LoopDelay
from workloads import few_large, have_ready, leaves_of, many_small

ROOT = Path(__file__).parent.parent
_MIB = 1 << 20
_RESAMPLED = 2000

Measured = dict[str, float]
TREES: dict[str, Callable[[], Any]] = {
    "large": lambda: few_large(512 * _MIB, 32),
    "small": lambda: many_small(20_000),
}


async def stage_cold(tree: Any) -> Measured:
    """Stage once, in memory that the machine has ready."""
    import aiostage

    have_ready(sum(tensor.nbytes for tensor in leaves_of(tree)))
    async with aiostage.AsyncStager() as stager:
        return await _measured(lambda: stager.stage(tree))


async def stage_warm(tree: Any) -> Measured:
    """Stage again and again with one stager."""
    import aiostage

    async with aiostage.AsyncStager() as stager:
        for _ in range(3):
            await stager.stage(tree)
        return _median([await _measured(lambda: stager.stage(tree)) for _ in range(7)])


async def save(tree: Any) -> Measured:
    """Save to a file system in memory."""
    import aiostage

    with tempfile.TemporaryDirectory(dir=_in_memory()) as folder:
        return await _measured(lambda: aiostage.save(tree, f"{folder}/checkpoint"))


async def load(tree: Any) -> Measured:
    """Load from a file system in memory."""
    import aiostage

    with tempfile.TemporaryDirectory(dir=_in_memory()) as folder:
        await aiostage.save(tree, f"{folder}/checkpoint")
        return await _measured(lambda: aiostage.load(f"{folder}/checkpoint"))


WORK: dict[str, Callable[[Any], Any]] = {
    "stage, warm": stage_warm,
    "stage, cold": stage_cold,
    "save": save,
    "load": load,
}


def _in_memory() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


async def _measured(call: Callable[[], Any]) -> Measured:
    delay = LoopDelay()
    async with delay:
        begin, cpu = perf_counter(), process_time()
        made = await call()
        wall, cpu = perf_counter() - begin, process_time() - cpu
    del made
    return {"time": wall, "CPU time": cpu, "worst delay": max(delay.delays, default=0.0)}


def _median(samples: list[Measured]) -> Measured:
    return {what: statistics.median(sample[what] for sample in samples) for what in samples[0]}


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Have a commit in a folder of its own for a while."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def run(tree: Path, work: str, size: str) -> Measured:
    """Measure one commit once, in a new process."""
    command = [sys.executable, __file__, "--child", work, size]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{work}, {size}, in {tree}:\n{done.stderr[-2000:]}")
    answer: Measured = json.loads(done.stdout.splitlines()[-1])
    return answer


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the interval of 95 % of a median, by bootstrap with a fixed seed."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLED))
    return medians[_RESAMPLED // 40], medians[-_RESAMPLED // 40 - 1]


def row(work: str, pairs: list[tuple[Measured, Measured]], what: str) -> dict[str, Any]:
    """Return what the pairs say about one figure."""
    ratios = [new[what] / old[what] for old, new in pairs if old[what]]
    low, high = interval(ratios)
    old, new = (statistics.median(pair[side][what] for pair in pairs) for side in (0, 1))
    verdict = "slower" if low > 1 else "faster" if high < 1 else "the same"
    return {"work": work, "what": what, "old": old, "new": new, "low": low, "high": high, "verdict": verdict}


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", help="a commit")
    parser.add_argument("new", nargs="?", help="another; the working tree by default")
    parser.add_argument("--pairs", type=int, default=9, help="how often each is run")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="what to run")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        work, size = arguments.child
        print(json.dumps(asyncio.run(WORK[work](TREES[size]()))))
        return
    if arguments.old is None:
        parser.error("name the commit to compare with")
    with checked_out(arguments.old) as old, checked_out(arguments.new or "HEAD") as committed:
        new = committed if arguments.new else ROOT
        print("| work | figure | old, ms | new, ms | new / old | |\n| --- | --- | ---: | ---: | ---: | --- |")
        rows = []
        for work in arguments.work:
            for size in TREES:
                pairs: list[tuple[Measured, Measured]] = []
                for _ in range(arguments.pairs):
                    turn = {tree: Measured() for tree in random.sample([old, new], 2)}
                    for tree in turn:
                        turn[tree] = run(tree, work, size)
                    pairs.append((turn[old], turn[new]))
                for what in pairs[0][0]:
                    rows.append(found := row(f"{work}, {size}", pairs, what))
                    print(
                        f"| {found['work']} | {what} | {1e3 * found['old']:.1f} | {1e3 * found['new']:.1f} "
                        f"| {found['low']:.2f} to {found['high']:.2f} | {found['verdict']} |",
                        flush=True,
                    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
