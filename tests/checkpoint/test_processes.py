from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from aiostage import Checkpointer
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.programs import ROOT, output_of
from tests.checkpoint.writing import tree
from tests.patience import seconds
from tests.warm import PYTHON

STEPS = 12
KEEP = 4


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes_save_the_same_steps(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [*PYTHON, "-m", "tests.checkpoint.writing", str(tmp_path), str(number), str(STEPS)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
        outputs = [writer.communicate(timeout=seconds(100)) for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
    assert [writer.returncode for writer in writers] == [0, 0], outputs
    won = [set(map(int, output.split())) for output, _ in outputs]
    # A step may be won twice: by one who is so far behind that the other's checkpoint of it has been removed again.
    assert won[0] | won[1] == set(range(STEPS))
    asyncio.run(check(tmp_path, won))


async def check(directory: Path, won: list[set[int]]) -> None:
    """Check that the last steps are there, each as a whole by one that has won it, and nothing else."""
    checkpoints = Checkpointer(directory)
    found = await checkpoints.steps()
    assert found[-KEEP:] == list(range(STEPS - KEEP, STEPS))
    for step in found:
        loaded = await checkpoints.restore(step=step)
        assert step in won[loaded["writer"]]
        assert_same(tree(step, loaded["writer"]), loaded)
    assert len(list(directory.iterdir())) == len(found)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", ["whole", "incremental"])
def test_a_run_that_is_killed_again_and_again(mode: str, tmp_path: Path) -> None:
    output = output_of("tests.checkpoint.dying_run", str(tmp_path), mode)
    # It has got somewhere in its short lives, which are as long as that takes.
    assert int(output) > 10
