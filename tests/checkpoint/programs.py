"""Tests that need a process of their own: programs beside the tests, run to their end."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.patience import seconds
from tests.warm import PYTHON

ROOT = Path(__file__).parent.parent.parent
TIMEOUT = seconds(110)


def output_of(module: str, *arguments: str) -> str:
    """Run a module of the tests as a program, and return what it prints; it has to end well."""
    outcome = subprocess.run(
        [*PYTHON, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout
