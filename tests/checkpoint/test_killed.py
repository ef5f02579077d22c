from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("mode", "way"), [("overwrite", "exchanging"), ("overwrite", "moving aside"), ("new", "exchanging")]
)
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new(mode: str, way: str, tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.dying", str(tmp_path), mode, way],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    found = {int(step): count for step, count in json.loads(outcome.stdout).items()}
    # Nothing or the old checkpoint before it is published, the new one after.
    assert set(found) == {1 if mode == "overwrite" else 0, 2}
    assert sum(found.values()) > 20
    assert found[2] > 1
