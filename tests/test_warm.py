"""Programs that are forks of a process that has imported PyTorch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.warm import PYTHON

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="programs are new processes here")

SCRIPT = """
import os, sys
assert "torch" in sys.modules
from beside import answer
os.write(int(sys.argv[2]), f"{answer} {sys.argv[1]} {os.path.basename(__file__)}".encode())
print(sorted(set(map(int, os.listdir("/proc/self/fd"))) - {0, 1, 2}))
sys.exit(7)
"""


def test_a_script_has_its_folder_its_arguments_and_the_descriptors_that_are_passed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("answer = 42\n")
    read, write = os.pipe()
    # Numbers in an order of their own, and one that the process which forks has open, too.
    high = os.dup2(write, 40)
    try:
        command = [*PYTHON, str(script), "argument", str(high)]
        done = subprocess.run(command, pass_fds=[high, write], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (7, "")
        assert os.read(read, 100) == b"42 argument script.py"
        # That of the listing is the lowest that is free.
        numbers = {int(number) for number in done.stdout.strip("[]\n").split(",")}
        assert {high, write} < numbers
        assert len(numbers) == 3
    finally:
        for number in (read, write, high):
            os.close(number)


def test_a_program_ends_when_its_command_is_killed() -> None:
    read, write = os.pipe()
    with subprocess.Popen(
        [*PYTHON, "-c", "import time; print(1, flush=True); time.sleep(600)"], stdout=write
    ) as running:
        os.close(write)
        assert os.read(read, 1) == b"1"
        running.kill()
        # The end of the pipe: nothing has the other end open any more.
        while os.read(read, 100):
            pass
    os.close(read)
