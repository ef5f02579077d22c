"""What the first staging of a process does not do on the event loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists the threads of a process there"),
    pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this PyTorch divides its work without OpenMP"),
]

PROGRAM = """
import asyncio
import os
import threading

import torch

import aiostage

torch.set_num_threads(4)

def not_pythons():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

async def main():
    tree = {str(n): torch.ones(50) for n in range(400)} | {"large": torch.empty(3 << 20)}
    before = not_pythons()
    async with aiostage.AsyncStager() as stager:
        await stager.stage(tree)
        started = not_pythons() - before
    # The control: as many as were allowed, the calling thread among them.
    torch.ones(4 << 20).add_(1)
    print(started, not_pythons() - before)

asyncio.run(main())
"""


def test_it_starts_no_threads_of_openmp() -> None:
    # Starting them, and waiting for them, took 10 to 38 ms on a busy machine.
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "3"]
