from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

import aiostage
from aiostage_command import main

BAD = "\x1b]0;title\x07\x9b2J\r\n\u202e\ud800\x7f"


def test_control_characters_of_a_file_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "checkpoint")
    asyncio.run(aiostage.save({BAD: BAD, (BAD, 1): {BAD: [BAD]}}, path))
    assert main(["inspect", path]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) > 4
    assert all(line.isprintable() for line in lines)
    assert any("\\x1b]0;title\\x07" in line for line in lines)
    assert main(["inspect", "--json", path]) == 0
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.split("\n"))
    assert [BAD] in [entry["path"] for entry in json.loads(text)["tree"]]


def test_neither_do_those_of_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "\x1b[2J\n")]) == 3
    message = capsys.readouterr().err
    assert message.endswith("\n")
    assert message[:-1].isprintable()
