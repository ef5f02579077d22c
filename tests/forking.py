"""Running programs that fork: in a process of their own, and with an end to what would hang."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.patience import seconds
from tests.warm import PYTHON

PRELUDE = """
import asyncio, contextlib, gc, os, signal, sys, threading, warnings
from collections.abc import Callable

warnings.simplefilter("error")
# Newer Pythons warn of every fork beside threads.
warnings.filterwarnings("ignore", "This process", DeprecationWarning)

@contextlib.contextmanager
def held(*locks):
    # By a thread that the child will not have.
    taken, over = threading.Event(), threading.Event()

    def hold():
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            taken.set()
            over.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    try:
        yield
    finally:
        over.set()
        holder.join()

def in_child(work: Callable[[], object], *locks) -> None:
    with held(*locks):
        child = os.fork()
        if child == 0:
            signal.alarm(120)
            try:
                work()
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            # With finalizers and atexit, unlike what multiprocessing does; but not up through the frames of the parent.
            gc.collect()
            __import__("atexit")._run_exitfuncs()
            sys.stderr.flush()
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the child has ended with {status}"

"""


def run_forking(program: str) -> None:
    """Run a program that may call ``in_child(work, *locks)``, which forks while a thread holds the locks.

    Any error_text counts as a failure, also one of a finalizer.
    """
    command = [*PYTHON, "-c", PRELUDE + program]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds(60), check=False, cwd=Path(__file__).parents[1]
    )
    assert (ended.returncode, ended.stderr) == (0, ""), f"{ended.returncode}: {ended.stderr}"
