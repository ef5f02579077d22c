"""The command itself: what it needs to answer, and what it prints for programs and for terminals."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
import aiostage_command
from aiostage_command import main
from tests.patience import seconds

COMMANDS = ("ls", "du", "inspect", "verify", "diff", "convert", "bench", "completion")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["diff", "--help"], ["completion"], ["unknown"]])
def test_what_needs_no_pytorch_does_not_import_it(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "before = len(sys.modules)\n"
        "from aiostage_command import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "found = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not found & {'torch', 'numpy', 'anyio', 'asyncio', 'aiostage'}, found\n"
        "print(len(sys.modules) - before, file=sys.stderr)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=seconds(60), check=True
    )
    # Each import is time: these 200 take some 0.05 s.
    assert int(run.stderr.splitlines()[-1]) < 200
    assert "aiostage" in run.stdout + run.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    expected = f"aiostage {aiostage_command.__version__} (Python {sys.version.split()[0]}, torch {version('torch')})\n"
    assert capsys.readouterr().out == expected


def test_the_help_names_every_command_and_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(re.search(rf"^    {name}\b", shown, re.MULTILINE) for name in COMMANDS)
    assert re.findall(r"^  ([0-9])  ", shown, re.MULTILINE) == ["0", "1", "2", "3"]


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    async def make() -> None:
        for number in range(2):
            await aiostage.save({"w": torch.full((4,), float(number))}, tmp_path / f"step-0000000{number}")

    asyncio.run(make())
    return [str(tmp_path / "step-00000000"), str(tmp_path / "step-00000001")]


def test_every_command_speaks_json(two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "file.pt")
    commands: dict[str, tuple[list[str], Any]] = {
        "ls": ([str(tmp_path)], lambda found: [each["step"] for each in found["checkpoints"]] == [0, 1]),
        "du": ([str(tmp_path)], lambda found: found["total_bytes"] > 2 * 4112),
        "inspect": (two[:1], lambda found: found["tree"][1]["dtype"] == "F32"),
        "verify": (two, lambda found: found["summary"]["whole"] == 2),
        "diff": (two, lambda found: found["differences"][0]["max_abs"] == 1),
        "convert": ([str(tmp_path / "file.pt"), str(tmp_path / "new")], lambda found: found["tensors"] == 1),
        "bench": (["--mebibytes", "1", "--rounds", "1"], lambda found: len(found["measured"]) == 5),
    }
    for name, (arguments, is_right) in commands.items():
        assert main([name, "--json", *arguments]) == (1 if name == "diff" else 0)
        shown = capsys.readouterr()
        assert is_right(json.loads(shown.out)), (name, shown.out)
        assert not shown.err
    assert {*commands, "completion"} == set(COMMANDS)


def test_colour_on_a_terminal_only(
    two: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_a_terminal(**environment: str) -> bytes:
        here, there = pty.openpty()
        try:
            with monkeypatch.context() as patch, os.fdopen(there, "w") as stream:
                patch.setattr(sys, "stdout", stream)
                for name, value in {"TERM": "xterm", "NO_COLOR": "", **environment}.items():
                    patch.setenv(name, value)
                assert main(["verify", two[0]]) == 0
                return os.read(here, 1 << 16)
        finally:
            os.close(here)

    whole = f"{two[0]}: 1 file, 4,112 bytes, all as they were written".encode()
    assert in_a_terminal() == b"\x1b[32m" + whole + b"\x1b[0m\r\n"
    assert in_a_terminal(NO_COLOR="1") == in_a_terminal(TERM="dumb") == whole + b"\r\n"
    assert main(["verify", two[0]]) == 0
    assert capsys.readouterr().out.encode() == whole + b"\n"


def completed(words: list[str]) -> list[str]:
    """Return bash's completions of the last word."""
    program = f"""
        eval "$({sys.executable} {aiostage_command.__file__} completion)"
        COMP_WORDS=({" ".join(words)}) COMP_CWORD={len(words) - 1}
        _aiostage
        printf '%s\\n' "${{COMPREPLY[@]}}"
        complete -p aiostage >&2
    """
    run = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=seconds(60), check=True)
    assert "-F _aiostage aiostage" in run.stderr
    return run.stdout.split()


def test_completion() -> None:
    assert set(COMMANDS) < set(completed(["aiostage", "''"]))
    assert completed(["aiostage", "in"]) == ["inspect"]
    assert completed(["aiostage", "verify", "--p"]) == ["--progress"]
    assert completed(["aiostage", "diff", "--"]) == ["--help", "--json", "--no-values"]
    assert completed(["aiostage", "completion", "f"]) == ["fish"]
    # Paths are left to the shell.
    assert completed(["aiostage", "diff", "/t"]) == []


def test_completion_of_fish(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 0
    script = capsys.readouterr().out
    lines = [line.removeprefix("complete -c aiostage -n ") for line in script.splitlines()]
    first = [shlex.split(line) for line in lines if line.startswith("'__fish_use_subcommand'")]
    assert [words[3] for words in first if words[1:3] == ["-f", "-a"]] == list(COMMANDS)
    later = [shlex.split(line) for line in lines if line.startswith("'__fish_seen_subcommand_from diff'")]
    assert [words[1:3] for words in later] == [["-l", "help"], ["-l", "json"], ["-l", "no-values"]]
    assert "'__fish_seen_subcommand_from completion' -f -a 'bash zsh fish' -d " in script
    if fish := shutil.which("fish"):
        program = 'source; complete -C "aiostage diff --n"'
        run = subprocess.run(
            [fish, "-c", program], input=script, capture_output=True, text=True, timeout=seconds(60), check=True
        )
        assert run.stdout.startswith("--no-values\t")
