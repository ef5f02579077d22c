"""What users install: the wheel has all of the package and nothing else, and works by itself."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import aiostage_command
from tests.patience import seconds

ROOT = Path(__file__).parent.parent

PROGRAM = """
import asyncio, importlib.metadata, pathlib, sys
import aiostage, torch

assert pathlib.Path(aiostage.__file__).is_relative_to(sys.argv[1]), aiostage.__file__

async def main():
    async with aiostage.AsyncStager() as stager:
        staged = await stager.stage({"a": torch.arange(3)})
    await aiostage.save(staged, "checkpoint")
    return await aiostage.load("checkpoint")

assert asyncio.run(main())["a"].tolist() == [0, 1, 2]

(script,) = importlib.metadata.entry_points(group="console_scripts", name="aiostage")
assert script.load()(["verify", "checkpoint"]) == 0
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_wheel(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
            "-w",
            tmp_path,
            ROOT,
        ],
        check=True,
        timeout=seconds(110),
    )
    (path,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(site)
    tracked = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "aiostage").rglob("*")
        if file.suffix in (".py", ".typed", ".cpp", ".hpp")
    }
    assert "aiostage/py.typed" in tracked
    assert {name for name in names if not name.startswith("aiostage-")} == tracked | {"aiostage_command.py"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (metadata,) = site.glob("*.dist-info/METADATA")
    told = message_from_string(metadata.read_text())
    assert told["Name"] == "aiostage"
    assert told["Requires-Python"] == ">=3.11"
    assert told["Version"] == aiostage_command.__version__
    outcome = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(site)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=seconds(60),
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr


def test_the_source_distribution(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(program, cwd=ROOT, check=True, timeout=seconds(55), capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "CHANGELOG.md", "aiostage_command.py", "aiostage/py.typed"} <= names
    assert {"tests/test_wheel.py", "docs/index.md", "Makefile", "constraints.txt"} <= names
    # Nothing of this machine or of what was run on it.
    hidden = {name.partition("/")[0] for name in names if name.startswith(".")}
    assert hidden <= {".gitignore", ".pre-commit-config.yaml", ".github"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
