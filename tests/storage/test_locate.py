"""What people write, and the storage and name that it stands for."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import aiostage
from aiostage.storage import LocalStorage, locate, storage_at
from tests.checkpoint.memory_storage import MemoryStorage


def where(target: object) -> tuple[str, str]:
    storage, name = locate(target)  # type: ignore[arg-type]
    return repr(storage), name


@pytest.mark.parametrize(
    ("target", "root", "name"),
    [
        ("checkpoint", "", "checkpoint"),
        ("runs/7", "runs", "7"),
        ("runs/7///", "runs", "7"),
        ("/runs/7", "/runs", "7"),
        (Path("/runs/7"), "/runs", "7"),
        (b"/runs/7", "/runs", "7"),
        ("../7", "..", "7"),
        (".", ".", "."),
        ("runs/..", "runs/..", "."),
        ("/", "/", "."),
        ("file:///runs/a%20b", "/runs", "a b"),
        ("file:///runs/a%23b%3F", "/runs", "a#b?"),
        ("/runs/a#b?", "/runs", "a#b?"),
        ("odd:name", "", "odd:name"),
        (("runs", "a/7"), "runs", "a/7"),
    ],
)
def test_paths(target: object, root: str, name: str) -> None:
    if isinstance(target, bytes):
        target = Path(os.fsdecode(target))
    assert where(target) == (f"<LocalStorage {root}>", name)


def test_a_storage_of_ones_own() -> None:
    storage = MemoryStorage()
    assert locate((storage, "a")) == (storage, "a")
    assert storage_at(storage) is storage
    assert isinstance(storage_at("runs"), LocalStorage)


@pytest.mark.parametrize("target", [MemoryStorage(), 7, None, ["runs", "7"], ("runs",), ("runs", 7), b"runs"])
def test_what_names_no_checkpoint(target: object) -> None:
    with pytest.raises(TypeError, match="a checkpoint is at a path"):
        locate(target)  # type: ignore[arg-type]


@pytest.mark.parametrize("root", [7, None, object()])
def test_what_is_no_root(root: object) -> None:
    with pytest.raises(TypeError, match="checkpoints lie below"):
        storage_at(root)


@pytest.mark.parametrize("url", ["s3://", "s3://bucket", "s3://bucket/"])
def test_a_url_has_to_name_one(url: str) -> None:
    with pytest.raises(ValueError, match=f"'{url}' names no checkpoint; .* s3://bucket/path"):
        locate(url)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "is empty"),
        ("runs\0/7", "null byte"),
        (Path("s3://bucket/runs/7"), "Pass URLs as text: 's3://...'"),
        (Path("fsspec+ftp://host/7"), "Pass URLs as text"),
        ("file://runs/7", "three slashes: 'file:///runs/7'"),
        ("file:///runs/exp#1", "Write %3F and %23 for them"),
        ("file:///runs/exp?", "Write %3F and %23 for them"),
    ],
)
def test_paths_by_mistake(path: str | Path, reason: str) -> None:
    for place in (locate, storage_at):
        with pytest.raises(ValueError, match=re.escape(reason)):
            place(path)


def test_a_directory_that_is_called_like_a_scheme() -> None:
    assert where("./s3:/7") == ("<LocalStorage ./s3:>", "7")
    assert where("file://localhost/runs/7") == ("<LocalStorage /runs>", "7")


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["", "/a", "../a", "a//b", "a/../b", "a/."])
async def test_names_that_lead_out(name: str, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for operation in (storage.open, storage.read, storage.delete):
        with pytest.raises(ValueError, match="not a name of a checkpoint"):
            await operation(name)


@pytest.mark.asyncio
async def test_saves_at_the_given_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = {"a": torch.ones(3)}
    for target in ("a", tmp_path / "b", (tmp_path, "deep/c"), (LocalStorage("."), "d"), f"file://{tmp_path}/e"):
        info = await aiostage.save(tree, target)
        assert torch.equal((await aiostage.load(target))["a"], tree["a"])
        assert info.location == str(info.path)
    assert list(await LocalStorage(tmp_path).list()) == ["a", "b", "d", "deep/c", "e"]
    monkeypatch.chdir(tmp_path / "a")
    assert torch.equal((await aiostage.load("."))["a"], tree["a"])
    await LocalStorage(tmp_path).delete("deep/c")
    assert "deep/c" not in await LocalStorage(tmp_path).list()


@pytest.mark.asyncio
async def test_what_cannot_be_saved_with_or_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        await aiostage.save({}, tmp_path / "file/a")
    with pytest.raises(TypeError, match=r"stager must be .* not 7.*adapt"):
        await aiostage.save({}, tmp_path / "a", stager=7)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
