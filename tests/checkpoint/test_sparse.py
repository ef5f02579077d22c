"""The check of a checkpoint's sparse tensors in host memory."""

from __future__ import annotations

import subprocess

from tests.warm import PYTHON

CHECK_WITHOUT_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from aiostage.format.nodes import reading
from aiostage.format.composites import check_invariants
from aiostage.errors import HostMemoryError

count = 1 << 22
parts = torch.arange(count)[None], torch.ones(count)
form = {"shape": [count], "coalesced": True}
with reading("manifest.json"):
    check_invariants("sparse", parts, form)
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (8 << 20), resource.RLIM_INFINITY))
try:
    with reading("manifest.json"):
        check_invariants("sparse", parts, form)
except HostMemoryError as error:
    print(error)
"""


def test_a_check_that_gets_no_memory_is_no_corrupt_checkpoint() -> None:
    """Whether indices are in order is found out with as many numbers of 8 bytes more."""
    done = subprocess.run([*PYTHON, "-c", CHECK_WITHOUT_MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no memory for a tensor" in done.stdout
    assert "manifest.json" in done.stdout
