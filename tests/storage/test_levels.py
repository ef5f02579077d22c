"""Other files and directories beside the checkpoints of a run are left alone."""

from __future__ import annotations

import os
import subprocess
import tempfile
import textwrap
from pathlib import Path

import pytest

import aiostage
from aiostage.storage import LocalStorage
from tests.patience import seconds
from tests.warm import PYTHON

OTHER_USER = """
    import asyncio, os, sys
    import aiostage

    async def main():
        async with aiostage.Checkpointer(sys.argv[1], keep=1) as checkpoints:
            await checkpoints.save(2, {"step": 2})
        print(await checkpoints.steps(), await checkpoints.latest(), await checkpoints.restore())

    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    asyncio.run(main())
"""


@pytest.mark.one_loop
@pytest.mark.asyncio
async def test_what_cannot_be_looked_into_is_passed_over() -> None:
    # Not below tmp_path, which pytest keeps from other users.
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        await pass_over(Path(parent) / "run")


async def pass_over(root: Path) -> None:
    await aiostage.save({"step": 1}, root / "step-00000001")
    (root / "lost+found").mkdir(mode=0o700)
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere")
    (root / "step-00000009").symlink_to("lost+found/below")
    (root / ".step-00000007.aiostage-0123456789abcdef").mkdir(mode=0o700)
    is_root = os.getuid() == 0
    if is_root:
        for path in (root, root / "step-00000001", *(root / "step-00000001").iterdir()):
            os.chown(path, 65534, 65534)
    else:
        (root / "lost+found").chmod(0)
    program = [*PYTHON, "-c", textwrap.dedent(OTHER_USER), str(root)]
    outcome = subprocess.run(program, capture_output=True, text=True, timeout=seconds(60), check=False)  # noqa: ASYNC221
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.strip() == "[2] 2 {'step': 2}"
    assert (root / "lost+found").is_dir()


@pytest.mark.asyncio
async def test_the_steps_own_level_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await aiostage.save({"step": 1}, tmp_path / "step-00000001")
    await aiostage.save({"step": 9}, tmp_path / "foreign" / "step-00000009")
    looked: list[str] = []
    scan = os.scandir

    def scandir(path: str) -> object:
        looked.append(str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert await aiostage.Checkpointer(tmp_path).latest() == 1
    assert looked == [str(tmp_path)]
    assert sorted(await LocalStorage(tmp_path).list()) == ["foreign/step-00000009", "step-00000001"]
    assert list(await LocalStorage(tmp_path).list_level()) == ["step-00000001"]


@pytest.mark.asyncio
async def test_a_directory_called_as_a_manifest_makes_no_checkpoint(tmp_path: Path) -> None:
    await aiostage.save({"step": 1}, tmp_path / "step-00000001")
    odd = tmp_path / "step-00000009"
    (odd / "manifest.json").mkdir(parents=True)
    await aiostage.save({"step": 3}, odd / "below" / "step-00000003")
    async with aiostage.Checkpointer(tmp_path, keep=1) as checkpoints:
        assert (await checkpoints.steps(), await checkpoints.latest()) == ([1], 1)
        assert await checkpoints.restore() == {"step": 1}
        with pytest.raises(aiostage.CheckpointExistsError, match="it is not a checkpoint"):
            await aiostage.save({"step": 9}, odd, overwrite=True)
        with pytest.raises(aiostage.CheckpointNotFoundError):
            await aiostage.load(odd)
        await checkpoints.delete(9)
        await checkpoints.save(10, {"step": 10})
    assert await checkpoints.steps() == [10]
    assert (odd / "manifest.json").is_dir()
    assert sorted(await LocalStorage(tmp_path).list()) == ["step-00000009/below/step-00000003", "step-00000010"]


@pytest.mark.asyncio
async def test_a_linked_manifest_is_said_to_be_one(tmp_path: Path) -> None:
    await aiostage.save({"step": 1}, tmp_path / "step-00000001")
    manifest = tmp_path / "step-00000001" / "manifest.json"
    manifest.rename(tmp_path / "elsewhere")
    for target in ("../elsewhere", "../nowhere"):
        manifest.symlink_to(target)
        assert await aiostage.Checkpointer(tmp_path).latest() == 1
        with pytest.raises(aiostage.CheckpointCorruptError, match="links in a checkpoint are not followed"):
            await aiostage.load(tmp_path / "step-00000001")
        manifest.unlink()


@pytest.mark.asyncio
async def test_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    await aiostage.save({"a": 1}, "~/runs/1")
    await aiostage.save({"a": 1}, Path("~/runs/2"))
    await aiostage.save({"a": 1}, (LocalStorage("~/runs"), "3"))
    async with aiostage.Checkpointer("~/runs") as checkpoints:
        await checkpoints.save(4, {"a": 4})
    assert sorted(path.name for path in (tmp_path / "home" / "runs").iterdir()) == ["1", "2", "3", "step-00000004"]
    assert not (tmp_path / "~").exists()
    assert await aiostage.load("~/runs/1") == {"a": 1}
