from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import seconds


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_users_code_passes_the_type_checker() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", str(Path(__file__).with_name("api.py"))],
        capture_output=True,
        text=True,
        timeout=seconds(170),
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout
