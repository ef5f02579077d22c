"""Programs that are forks of a process that has imported PyTorch."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import PYTHON, executable

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
    # Not a number that this process may have given to something else, which dup2() would close.
    high = fcntl.fcntl(write, fcntl.F_DUPFD, 40)
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


def test_a_program_that_was_killed_has_ended_before_the_next_one_begins(tmp_path: Path) -> None:
    program = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
time.sleep(600)
"""
    for _ in range(5):
        with subprocess.Popen(
            [*PYTHON, "-c", program, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
        ) as running:
            assert running.stdout is not None
            assert running.stdout.readline() == "locked\n"
            running.kill()


def test_what_python_and_pytorch_take_at_their_start(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    # Without -u, what is printed would be lost.
    script.write_text("import os, torch; print(torch.get_num_threads()); os._exit(0)")
    for threads in (1, 3):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [*PYTHON, "-u", str(script)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"{threads}\n"


def test_descriptors_have_the_numbers_of_those_that_the_process_which_forks_has_itself() -> None:
    numbers = range(3, 60)
    crowded = f"import os, sys; [os.dup2(1, number) for number in {numbers}]; os.execv(sys.argv[1], sys.argv[1:])"
    program = f"import os; [os.fstat(number) for number in {numbers}]; print('open', flush=True); input()"
    command = [sys.executable, "-I", "-S", "-c", crowded, *PYTHON, "-c", program]
    # Later ones find more of the earlier ones' there.
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
    for process in running:
        assert process.communicate("\n")[0] == ""
        assert process.returncode == 0


def test_descriptors_of_high_numbers() -> None:
    read, write = os.pipe()
    high = fcntl.fcntl(write, fcntl.F_DUPFD, 1 << 10)
    try:
        subprocess.run([*PYTHON, "-c", f"import os; os.write({high}, b'x')"], pass_fds=[high], check=True)
        assert os.read(read, 1) == b"x"
    finally:
        for number in (read, write, high):
            os.close(number)


def test_a_child_that_multiprocessing_forks_leaves_the_program_to_its_parent() -> None:
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert os.access(executable(), os.X_OK)
