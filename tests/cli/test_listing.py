"""The checkpoints of a run: which there are, how old, and how much they take."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

import aiostage
from aiostage import dcp
from aiostage_command import main
from tests.cli.test_main import make_run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

Shown = pytest.CaptureFixture[str]


def said(capsys: Shown, *arguments: str, status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main([arguments[0], "--json", *arguments[1:]]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_ls_and_du_of_a_run_that_shares(tmp_path: Path, capsys: Shown) -> None:
    asyncio.run(make_run(tmp_path))
    lora = tmp_path / "lora"
    os.utime(lora / "step-00000002" / "manifest.json", (0, time.time() - 7200))
    listed = said(capsys, "ls", str(lora))
    assert [each["step"] for each in listed["checkpoints"]] == [2, 3]
    assert listed["removed"] == ["step-00000000"]
    first, second = listed["checkpoints"]
    assert 7200 <= first["age_seconds"] < 7300 > second["age_seconds"] + 7000
    assert first["incremental"]
    assert first["refers_to"] == ["step-00000000"]
    assert first["own_bytes"] == on_disk(lora / "step-00000002")
    assert main(["ls", str(lora)]) == 0
    assert "  step-00000002                 2 h " in capsys.readouterr().out
    used = said(capsys, "du", str(lora))
    kept = (lora / "step-00000000" / "model.safetensors").stat().st_size
    assert used["kept_for_others_bytes"] == used["shared_bytes"] == kept
    assert used["total_bytes"] == kept + sum(on_disk(lora / f"step-0000000{step}") for step in (2, 3))
    assert used["without_sharing_bytes"] == used["total_bytes"] + kept
    assert [each["freed_bytes"] for each in used["checkpoints"]] == [
        on_disk(lora / f"step-0000000{step}") for step in (2, 3)
    ]
    # From above, names have the run before them; a checkpoint alone has what it needs.
    above = said(capsys, "du", str(tmp_path))
    assert above["total_bytes"] == used["total_bytes"] + on_disk(tmp_path / "best")
    assert said(capsys, "du", str(lora / "step-00000003"))["total_bytes"] == used["checkpoints"][1]["nbytes"]
    assert main(["du", str(lora / "step-00000003")]) == 0
    assert "in other checkpoints" in capsys.readouterr().out


def test_ls_and_du_of_all_kinds(tmp_path: Path, capsys: Shown) -> None:
    state = {"w": torch.arange(1000.0), "step": 1}
    writer = dcp.StorageWriter(tmp_path / "ranks")
    asyncio.run(dcp.save(state, checkpoint_id="step-00000001", storage_writer=writer, no_dist=True))
    (ranks,) = said(capsys, "ls", str(tmp_path / "ranks"))["checkpoints"]
    assert (ranks["kind"], ranks["step"], ranks["tensors"], ranks["nbytes"]) == ("aiostage.dcp", 1, 1, 4000)
    assert said(capsys, "du", str(tmp_path / "ranks"))["total_bytes"] == on_disk(tmp_path / "ranks")
    torch.save(state, tmp_path / "f.pt")
    (file,) = said(capsys, "ls", str(tmp_path / "f.pt"))["checkpoints"]
    assert (file["kind"], file["step"], file["nbytes"]) == ("torch.save", None, 4000)
    assert said(capsys, "du", str(tmp_path / "f.pt"))["total_bytes"] == (tmp_path / "f.pt").stat().st_size


def test_a_directory_with_checkpoints_of_other_programs_is_a_run(tmp_path: Path, capsys: Shown) -> None:
    state = {"w": torch.arange(10.0)}
    for step in (2, 10):
        torch_dcp.save(state, checkpoint_id=tmp_path / f"step-{step}", no_dist=True)
    torch.save(state, tmp_path / "last.ckpt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "needs-code.pt")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "log.txt").write_text("step 10")
    found = said(capsys, "ls", str(tmp_path), status=3)["checkpoints"]
    assert [(each["name"], each.get("kind")) for each in found] == [
        ("last.ckpt", "torch.save"),
        ("needs-code.pt", None),
        ("step-2", "torch.distributed.checkpoint"),
        ("step-10", "torch.distributed.checkpoint"),
    ]
    assert "torch.nn.modules.linear.Linear" in found[1]["error"]
    (tmp_path / "needs-code.pt").unlink()
    used = said(capsys, "du", str(tmp_path))
    assert used["total_bytes"] == sum(
        on_disk(tmp_path / name) if (tmp_path / name).is_dir() else (tmp_path / name).stat().st_size
        for name in ("last.ckpt", "step-2", "step-10")
    )
    # What a killed save leaves, and what an interrupted copy leaves.
    (tmp_path / "step-2" / ".metadata").unlink()
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:-100])
    checked = said(capsys, "verify", str(tmp_path), status=1)
    assert [Path(each["source"]).name for each in checked["checkpoints"] if each["whole"]] == ["step-10"]
    assert [Path(each["source"]).name for each in checked["checkpoints"] if not each["whole"]] == ["last.ckpt"]
    assert [Path(each["source"]).name for each in checked["unread"]] == ["step-2"]
    assert "did not end" in checked["unread"][0]["reason"]


def test_a_damaged_checkpoint_is_reported_and_the_others_are_listed(tmp_path: Path, capsys: Shown) -> None:
    for step in range(2):
        asyncio.run(aiostage.save({"w": torch.zeros(3)}, tmp_path / f"step-0000000{step}"))
    (tmp_path / "step-00000000" / "manifest.json").write_text("{}")
    first, second = said(capsys, "ls", str(tmp_path), status=1)["checkpoints"]
    assert "it is not a manifest" in first["error"]
    assert second["step"] == 1
    # How much it takes cannot be known then.
    assert main(["du", str(tmp_path)]) == 1
    assert "it is not a manifest" in capsys.readouterr().err


def test_a_checkpoint_that_may_not_be_read_is_reported_and_the_others_are_listed(
    tmp_path: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(2):
        asyncio.run(aiostage.save({"w": torch.zeros(3)}, tmp_path / f"step-0000000{step}"))
    opened = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("step-00000000"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    first, second = said(capsys, "ls", str(tmp_path), status=3)["checkpoints"]
    assert "Permission denied" in first["error"]
    assert second["step"] == 1


def test_through_a_url(tmp_path: Path, capsys: Shown) -> None:
    pytest.importorskip("fsspec")
    asyncio.run(aiostage.save({"w": torch.zeros(3)}, tmp_path / "run" / "step-00000004"))
    url = f"file://{tmp_path}/run"
    assert said(capsys, "ls", url)["checkpoints"][0]["step"] == 4
    remote = f"fsspec+file://{tmp_path}/remote"
    asyncio.run(aiostage.save({"w": torch.zeros(3)}, f"{remote}/step-00000005"))
    (found,) = said(capsys, "ls", remote)["checkpoints"]
    assert (found["step"], found["age_seconds"] < 600) == (5, True)
    assert said(capsys, "verify", remote)["summary"]["whole"] == 1
    assert said(capsys, "diff", f"{url}/step-00000004", f"{remote}/step-00000005")["same"]
