from __future__ import annotations

import asyncio
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm

import aiostage
from aiostage import CheckpointCorruptError
from aiostage.checkpoint.progress import LoadProgress, Progress, SaveProgress
from aiostage.integrations.tqdm import ProgressBar
from tests.patience import seconds
from tests.warm import PYTHON


def tree() -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(5 << 20), "b": torch.ones(3)}


def monitor_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "TMonitor" in type(thread).__name__}


@pytest.mark.asyncio
async def test_a_bar_for_a_save_and_a_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bars of other tests may have started a monitor, which another bar would use.
    monkeypatch.setattr(tqdm, "monitor", None)
    monitors = monitor_threads()
    await aiostage.save(tree(), tmp_path / "step-1", progress=True)
    await aiostage.load(tmp_path / "step-1", progress=True)
    shown = capsys.readouterr()
    assert not shown.out
    saving, loading = (text.rstrip().rsplit("\r", 1)[1] for text in re.split(r"\n", shown.err.strip()))
    assert re.match(r"saving step-1: 100%.*20\.0M/20\.0M .*B/s", saving)
    assert re.match(r"loading step-1: 100%.*20\.0M/20\.0M .*B/s", loading)
    assert monitor_threads() == monitors


@pytest.mark.asyncio
async def test_bars_of_saves_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with aiostage.AsyncStager() as stager:
        await asyncio.gather(
            *(aiostage.save(tree(), tmp_path / f"step-{n}", stager=stager, progress=True) for n in range(3))
        )
    shown = capsys.readouterr().err
    for number in range(3):
        assert f"saving step-{number}: 100%" in shown


@pytest.mark.asyncio
async def test_a_bar_ends_with_its_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = await aiostage.save(tree(), tmp_path / "step-1")
    with (info.path / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(CheckpointCorruptError):
        await aiostage.load(info.path, progress=True)
    assert capsys.readouterr().err.endswith("\n")


def test_what_was_staged_and_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar("saving", mininterval=0)
    bar.show(SaveProgress(name="step-1", total_bytes=4096, staged_bytes=3072, written_bytes=1024))
    assert "3.00kB staged" in capsys.readouterr().err
    bar.show(LoadProgress(name="step-1", total_bytes=4096, read_bytes=4096))
    with pytest.raises(TypeError, match="no bar"):
        bar.show(Progress(name="step-1", total_bytes=1))
    bar.close()
    assert "4.00k/4.00k" in capsys.readouterr().err


def test_a_bar_makes_no_lock_of_multiprocessing() -> None:
    """On an event loop that would block: from Python 3.14 on, making one creates a file."""
    program = (
        "from aiostage.integrations.tqdm import ProgressBar, TqdmDefaultWriteLock\n"
        "ProgressBar('a save').close()\n"
        "assert not hasattr(TqdmDefaultWriteLock, 'mp_lock')\n"
    )
    subprocess.run([*PYTHON, "-c", program], check=True, timeout=seconds(20), stderr=subprocess.DEVNULL)
