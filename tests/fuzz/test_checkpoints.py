from __future__ import annotations

from tests.fuzz.checkpoints import run


def test_some_hundreds_of_changed_checkpoints() -> None:
    counts, failed = run(300, seed=1)
    assert failed == 0
    assert counts["CheckpointCorruptError"] > 300
    assert counts["read"] > 10
