from __future__ import annotations

from pathlib import Path

import pytest

import aiostage
from aiostage.cli.inspect import inspect


@pytest.mark.asyncio
async def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    bad = "\x1b]0;title\x07\x9b2J\r\n\u202e\ud800"
    await aiostage.save({bad: bad, (bad, 1): {bad: [bad]}}, tmp_path / "checkpoint")
    lines = [line async for line in inspect(str(tmp_path / "checkpoint"))]
    assert len(lines) > 4
    assert all(line.isprintable() for line in lines)
    assert any("\\x1b]0;title\\x07" in line for line in lines)
