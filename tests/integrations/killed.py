"""Running a training program until it dies, and again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def losses(program: str, *arguments: object, ranks: int = 1, dies: bool = False) -> dict[int, list[float]]:
    """Run a program of this folder and return what it printed for each step.

    Args:
        program: The name of its module.
        arguments: Of the program.
        ranks: How many processes train.
        dies: Whether it is to die.
    """
    module = f"tests.integrations.{program}"
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "COVERAGE_PROCESS_START")
    }
    ended = subprocess.run(
        [*command, module, *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert (ended.returncode != 0) == dies, ended.stdout + ended.stderr
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")]
    return {step: rest for step, *rest in lines}


def check_continued(
    whole: dict[int, list[float]], first: dict[int, list[float]], second: dict[int, list[float]]
) -> None:
    """Check that a training which was killed and continued has the losses of one that was not."""
    assert min(second) > 1, "it began anew"
    assert max(second) == max(whole)
    assert min(second) <= max(first) + 1
    assert first == {step: whole[step] for step in first}
    assert second == {step: whole[step] for step in second}
