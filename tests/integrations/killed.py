"""Running a training program until it dies, and again.

``python -m tests.integrations.killed PROGRAM`` imports a program of this folder and then runs its ``main`` as often as
it is told on standard input, each time in forks of itself: importing what it trains with takes longer than training.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.patience import seconds
from tests.servers.process import free_ports

ROOT = Path(__file__).parents[2]
TIMEOUT = seconds(150)

SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

IMPORTED_LATE = ("torch._dynamo", "torch.distributed._functional_collectives")
"""What PyTorch imports when the first optimizer is made, and when the first group is."""


class Program:
    """A program of this folder, imported in a process of its own, and run in forks of that.

    Args:
        name: The name of its module.
        folder: Where the output of its runs goes.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._folder = folder
        self._runs = 0
        environment = {key: value for key, value in os.environ.items() if key not in SET_BY_TORCHRUN}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.killed", f"tests.integrations.{name}"],
            cwd=ROOT,
            # Without threads in it, so that it may fork.
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def losses(self, *arguments: str | Path | int, ranks: int = 1, dies: bool = False) -> dict[int, list[float]]:
        """Run the program and return what it printed for each step.

        Args:
            *arguments: Of its ``main``.
            ranks: How many processes train.
            dies: Whether it is to die.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._runs += 1
        output = self._folder / f"output-{self._runs}"
        said = [argument if isinstance(argument, int) else str(argument) for argument in arguments]
        print(json.dumps([ranks, str(output), said]), file=self._process.stdin, flush=True)
        statuses = json.loads(self._process.stdout.readline())
        printed = output.read_text()
        assert any(status != 0 for status in statuses) == dies, printed + output.with_suffix(".errors").read_text()
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith("[")]
        return {step: rest for step, *rest in lines}

    def end(self) -> None:
        self._process.communicate(timeout=TIMEOUT)
        assert self._process.returncode == 0


@contextlib.contextmanager
def running(name: str, folder: Path) -> Iterator[Program]:
    """Import a program of this folder, and end it together with the block."""
    started = Program(name, folder)
    try:
        yield started
        started.end()
    finally:
        started._process.kill()


def check_continued(
    whole: dict[int, list[float]], first: dict[int, list[float]], second: dict[int, list[float]]
) -> None:
    """Check that a training which was killed and continued has the losses of one that was not."""
    assert min(second) > 1, "it began anew"
    assert max(second) == max(whole)
    assert min(second) <= max(first) + 1
    assert first == {step: whole[step] for step in first}
    assert second == {step: whole[step] for step in second}


def _run(main: Any, output: str, arguments: list[Any], environment: dict[str, str]) -> int:
    """Run a program in a fork of this process, and return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.alarm(int(TIMEOUT))
        os.environ.update(environment)
        for descriptor, path in ((1, output), (2, output + ".errors")):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
        main(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve(module: str) -> None:
    """Run the program as often as a line of standard input says, and answer each with how its processes ended."""
    main = importlib.import_module(module).main
    for late in IMPORTED_LATE:
        importlib.import_module(late)
    for line in sys.stdin:
        ranks, output, arguments = json.loads(line)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])} if ranks > 1 else {}
        size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        left = [
            _run(main, output, arguments, shared | size | ({"RANK": str(n), "LOCAL_RANK": str(n)} if size else {}))
            for n in range(ranks)
        ]
        statuses = []
        while left:
            child, status = os.wait()
            left.remove(child)
            statuses.append(os.waitstatus_to_exitcode(status))
            if statuses[-1] != 0:
                # As torchrun does it.
                for other in left:
                    os.kill(other, signal.SIGKILL)
        print(json.dumps(statuses), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
