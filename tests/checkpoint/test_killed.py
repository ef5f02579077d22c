from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoint.programs import output_of


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("mode", "way"), [("overwrite", "exchanging"), ("overwrite", "moving aside"), ("new", "exchanging")]
)
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new(mode: str, way: str, tmp_path: Path) -> None:
    output = json.loads(output_of("tests.checkpoint.dying", str(tmp_path), mode, way))
    found = {int(step): count for step, count in output.items()}
    # Nothing or the old checkpoint before it is published, the new one after.
    assert set(found) == {1 if mode == "overwrite" else 0, 2}
    assert sum(found.values()) > 20
    assert found[2] > 1
