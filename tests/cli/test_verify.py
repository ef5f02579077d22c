"""What verify says of damage: all of it, and which tensors it touches."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import errno
import json
import os
import pathlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
import xxhash
from safetensors.torch import save_file

import aiostage
from aiostage import dcp
from aiostage_command import main

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

PART = 8 << 20
Shown = pytest.CaptureFixture[str]


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def verified(capsys: Shown, *sources: Path | str, status: int) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["verify", "--json", *map(str, sources)]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def damage_of(capsys: Shown, source: Path) -> list[tuple[Any, ...]]:
    (report,) = verified(capsys, source, status=1)["checkpoints"]
    assert not report["whole"]
    return [(each["file"], each["start"], each["stop"], sorted(each["tensors"])) for each in report["damage"]]


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A checkpoint of five parts in three files."""
    state = {name: torch.zeros(PART + number, dtype=torch.uint8) for number, name in enumerate("abcd")}
    state["tied"] = state["d"]
    saving = aiostage.save({"model": state, "step": 1}, tmp_path / "large", max_shard_bytes=2 * PART)
    return asyncio.run(saving).path


def test_all_damage_is_found_with_the_tensors_that_it_touches(large: Path, capsys: Shown) -> None:
    files = sorted(path.name for path in large.iterdir() if path.suffix == ".safetensors")
    assert len(files) > 1
    whole = verified(capsys, large, status=0)["checkpoints"][0]
    assert (whole["files"], whole["damage"]) == (len(list(large.iterdir())) - 1, [])
    flip(large / files[0], 4096 + 5)
    flip(large / files[-1], (large / files[-1]).stat().st_size - 1)
    found = damage_of(capsys, large)
    assert [each[0] for each in found] == [files[0], files[-1]]
    assert found[0][1:3] == (0, PART)
    assert found[1][2] == (large / files[-1]).stat().st_size
    touched = [name for each in found for name in each[3]]
    assert 2 <= len(touched) < 4
    assert all(name.startswith("model.") for name in touched)
    # Parts beside each other are one.
    flip(large / files[0], PART + 5)
    assert damage_of(capsys, large)[0][1] == 0
    assert damage_of(capsys, large)[0][2] > PART


def test_a_missing_file_and_a_short_one(large: Path, capsys: Shown) -> None:
    files = sorted(path.name for path in large.iterdir() if path.suffix == ".safetensors")
    nbytes = (large / files[0]).stat().st_size
    (large / files[1]).unlink()
    os.truncate(large / files[0], nbytes - 1)
    found = damage_of(capsys, large)
    assert [each[0] for each in found] == files[:2]
    assert found[0][2] == nbytes
    assert found[1][1] == 0
    assert {*found[0][3], *found[1][3]} < {f"model.{name}" for name in "abcd"}
    assert found[1][3]
    (report,) = verified(capsys, large, status=1)["checkpoints"]
    assert report["damage"][1]["reason"] == "the file is missing."
    # Longer ones are told, and what counts of them is compared.
    os.truncate(large / files[0], nbytes + 5)
    (report,) = verified(capsys, large, status=1)["checkpoints"]
    assert f"expected {nbytes} bytes, got {nbytes + 5}." in {each["reason"] for each in report["damage"]}


def test_a_header_that_cannot_be_read_leaves_all_tensors_of_its_file_in_doubt(large: Path, capsys: Shown) -> None:
    files = sorted(path.name for path in large.iterdir() if path.suffix == ".safetensors")
    before = damage_of_all(large, files, capsys)
    flip(large / files[1], 9)
    ((file, _, _, tensors),) = damage_of(capsys, large)
    assert (file, tensors) == (files[1], before[files[1]])


def damage_of_all(large: Path, files: list[str], capsys: Shown) -> dict[str, list[str]]:
    """Return the tensors of each file."""
    assert main(["inspect", "--json", str(large)]) == 0
    names = {".".join(each["path"]) for each in json.loads(capsys.readouterr().out)["tree"] if each["kind"] == "tensor"}
    found = {}
    for file in files:
        (large / file).rename(large / "aside")
        found[file] = damage_of(capsys, large)[0][3]
        (large / "aside").rename(large / file)
    assert set().union(*found.values()) == names
    return found


def test_bytes_that_a_disk_cannot_read_are_damage(large: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(path.name for path in large.iterdir() if path.suffix == ".safetensors")
    preadv = os.preadv

    reason = errno.EIO

    def broken(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        if os.path.samestat(os.fstat(descriptor), (large / files[0]).stat()) and offset >= PART:
            raise OSError(reason, os.strerror(reason))
        return preadv(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", broken)
    ((file, start, _, tensors),) = damage_of(capsys, large)
    assert (file, start) == (files[0], PART)
    assert tensors

    # Of what cannot be reached nothing is known.
    reason = errno.ESTALE
    assert main(["verify", str(large)]) == 3
    assert "Stale file handle" in capsys.readouterr().err


def test_it_goes_on_after_what_is_damaged_or_missing(tmp_path: Path, capsys: Shown) -> None:
    for name in "abc":
        asyncio.run(aiostage.save({"w": torch.zeros(3)}, tmp_path / name))
    flip(tmp_path / "a" / "model.safetensors", 4097)
    (tmp_path / "b" / "manifest.json").write_text("{}")
    assert main(["verify", str(tmp_path / "missing"), str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert shown.err == f"aiostage verify: {tmp_path / 'missing'}: there is no checkpoint, and none below it.\n"
    lines = shown.out.splitlines()
    assert lines[0] == f"{tmp_path}/a: damaged"
    assert lines[2:4] == ["    touches w", f"{tmp_path}/b: damaged"]
    assert "manifest.json: it is not a manifest" in lines[4]
    assert lines[5].startswith(f"{tmp_path}/c: 1 file, ")
    assert lines[6] == "4 checkpoints: 1 whole, 2 damaged, with 1 tensor touched, 1 not read"


def test_bytes_as_they_were_written_that_are_no_checkpoint(tmp_path: Path, capsys: Shown) -> None:
    path = asyncio.run(aiostage.save({"w": torch.zeros(3)}, tmp_path / "a")).path
    text = (path / "manifest.json").read_text()
    # Its own checksum is right, and it names a tensor that no file has.

    text = text.replace('"name":"w"', '"name":"v"')
    head = text[: text.rindex('],"digest"')]
    (path / "manifest.json").write_text(f'{head}],"digest":"{xxhash.xxh3_64_hexdigest(head.encode())}"}}\n')
    ((file, *_),) = damage_of(capsys, path)
    assert file == "manifest.json"


class TestManyRanks:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        state = {"a": torch.arange(1000.0), "b": {"c": torch.ones(3, dtype=torch.float64)}, "step": 3}
        writer = dcp.StorageWriter(tmp_path)
        asyncio.run(dcp.save(state, checkpoint_id="one", storage_writer=writer, no_dist=True))
        return tmp_path / "one"

    def test_each_damaged_record_is_named(self, checkpoint: Path, capsys: Shown) -> None:
        (report,) = verified(capsys, checkpoint, status=0)["checkpoints"]
        nbytes = sum(path.stat().st_size for path in checkpoint.iterdir() if path.name != "manifest.json")
        assert (report["kind"], report["files"], report["nbytes"]) == ("aiostage.dcp", 2, nbytes)
        file = checkpoint / "rank-00000.bin"
        flip(file, 1)
        assert damage_of(capsys, checkpoint) == [("rank-00000.bin", 0, 24, ["b.c"])]
        flip(file, file.stat().st_size - 1)
        assert [each[3] for each in damage_of(capsys, checkpoint)] == [["b.c"], ["step"]]
        file.unlink()
        assert sorted(each[3][0] for each in damage_of(capsys, checkpoint)) == ["a", "b.c", "step"]

    @pytest.mark.parametrize("name", [".metadata", "manifest.json"])
    def test_what_describes_it(self, checkpoint: Path, name: str, capsys: Shown) -> None:
        flip(checkpoint / name, 40)
        assert damage_of(capsys, checkpoint)[0][1:] == (None, None, [])

    def test_metadata_of_a_stranger(self, checkpoint: Path, capsys: Shown) -> None:
        """Its checksum is right, and what it says of places is not."""
        storage = aiostage.storage.LocalStorage(checkpoint.parent)

        async def index() -> Any:
            reader = await storage.read("one")
            try:
                return await dcp.storage.read_index(reader)
            finally:
                await reader.aclose()

        metadata = asyncio.run(index())
        for key, value in (("offset", "x"), ("nbytes", -1), ("nbytes", 1 << 60), ("file", 5), ("file", "../one/x")):
            forged = copy.deepcopy(metadata)
            for at, record in forged.storage_data.items():
                forged.storage_data[at] = dataclasses.replace(record, **{key: value})
            pickled = pickle.dumps(forged)
            (checkpoint / ".metadata").write_bytes(pickled)
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            manifest["metadata"] |= {"nbytes": len(pickled), "xxh3_64": xxhash.xxh3_64_hexdigest(pickled)}
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))
            assert main(["verify", str(checkpoint)]) == 1
            assert main(["inspect", str(checkpoint)]) == 1

    def test_a_long_file(self, checkpoint: Path, capsys: Shown) -> None:
        with (checkpoint / "rank-00000.bin").open("ab") as file:
            file.write(b"x")
        assert damage_of(capsys, checkpoint) == [("rank-00000.bin", None, None, [])]


class TestOfOtherPrograms:
    def test_torch_dcp(self, tmp_path: Path, capsys: Shown) -> None:
        state = {"a": torch.zeros(5000), "b": torch.ones(3), "step": 3}
        torch_dcp.save(state, checkpoint_id=tmp_path / "d", no_dist=True)
        (report,) = verified(capsys, tmp_path / "d", status=0)["checkpoints"]
        assert "CRC-32" in report["note"]
        (file,) = (tmp_path / "d").glob("*.distcp")
        flip(file, file.read_bytes().index(b"\0" * 10_000) + 5000)
        ((name, start, stop, tensors),) = damage_of(capsys, tmp_path / "d")
        assert (name, tensors) == (file.name, ["a"])
        assert stop - start > 20_000
        os.truncate(file, 100)
        found = damage_of(capsys, tmp_path / "d")
        assert {each[3][0] for each in found} == {"a", "b", "step"}
        file.unlink()
        assert [each[0] for each in damage_of(capsys, tmp_path / "d")] == [file.name] * 3
        os.truncate(tmp_path / "d" / ".metadata", 100)
        assert damage_of(capsys, tmp_path / "d")[0][0] == ".metadata"

    def test_torch(self, tmp_path: Path, capsys: Shown) -> None:
        state = {"a": torch.zeros(5000), "b": torch.ones(5000), "views": [torch.zeros(3)[1:]]}
        torch.save(state, tmp_path / "f.pt")
        (report,) = verified(capsys, tmp_path / "f.pt", status=0)["checkpoints"]
        assert (report["kind"], report["files"]) == ("torch.save", 1)
        with zipfile.ZipFile(tmp_path / "f.pt") as archive:
            offset = archive.getinfo("f/data/1").header_offset
        flip(tmp_path / "f.pt", offset + 10_000)
        assert [each[3] for each in damage_of(capsys, tmp_path / "f.pt")] == [["b"]]

    def test_an_archive_that_needs_code_is_compared_all_the_same(self, tmp_path: Path, capsys: Shown) -> None:
        torch.save({"a": torch.zeros(5000), "needs": pathlib.PurePosixPath("code")}, tmp_path / "f.pt")
        assert main(["inspect", str(tmp_path / "f.pt")]) == 3
        assert verified(capsys, tmp_path / "f.pt", status=0)["summary"]["whole"] == 1
        data = (tmp_path / "f.pt").read_bytes()
        flip(tmp_path / "f.pt", data.index(b"needs"))
        assert damage_of(capsys, tmp_path / "f.pt")[0][0] == "f.pt"

    def test_safetensors(self, tmp_path: Path, capsys: Shown) -> None:
        save_file({"a": torch.zeros(3)}, tmp_path / "f.safetensors")
        assert main(["verify", str(tmp_path / "f.safetensors")]) == 0
        assert "safetensors has no checksums" in capsys.readouterr().out
        os.truncate(tmp_path / "f.safetensors", 70)
        assert damage_of(capsys, tmp_path / "f.safetensors")[0][0] == "f.safetensors"

    def test_shards_of_a_hub(self, tmp_path: Path, capsys: Shown) -> None:
        save_file({"a": torch.zeros(3)}, tmp_path / "1.safetensors")
        torch.save({"b": torch.zeros(3)}, tmp_path / "2.bin")
        where = {"a": "1.safetensors", "b": "2.bin"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        (report,) = verified(capsys, tmp_path, status=0)["checkpoints"]
        assert (report["kind"], report["files"]) == ("shards of a hub", 2)
        (tmp_path / "2.bin").rename(tmp_path / "3.bin")
        assert damage_of(capsys, tmp_path)[0][0] == "2.bin"
        where |= {"b": "3.bin", "c": "3.bin"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        assert damage_of(capsys, tmp_path)[0][0] == "model.safetensors.index.json"

    def test_an_archive_whose_list_is_damaged(self, tmp_path: Path, capsys: Shown) -> None:
        torch.save({"a": torch.zeros(3)}, tmp_path / "f.pt")
        data = bytearray((tmp_path / "f.pt").read_bytes())
        data[data.index(b"PK\x01\x02")] = 0
        (tmp_path / "f.pt").write_bytes(data)
        ((file, *_),) = damage_of(capsys, tmp_path / "f.pt")
        assert file == "f.pt"

    @pytest.mark.parametrize("command", ["inspect", "verify", "ls"])
    def test_damaged_pickles_and_archives_of_torch(self, command: str, tmp_path: Path, capsys: Shown) -> None:
        torch.save({"a": torch.zeros(3)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
        os.truncate(tmp_path / "legacy.pt", 60)
        assert main([command, str(tmp_path / "legacy.pt")]) == 1
        torch.save({"a": torch.zeros(3)}, tmp_path / "f.pt")
        data = bytearray((tmp_path / "f.pt").read_bytes())
        # How the first member is compressed.
        data[data.index(b"PK\x01\x02") + 10] = 99
        (tmp_path / "f.pt").write_bytes(data)
        assert main([command, str(tmp_path / "f.pt")]) in (0, 1)
        if command == "verify":
            assert "does not match its CRC-32" in capsys.readouterr().out

    def test_what_cannot_be_read_here(self, tmp_path: Path, capsys: Shown) -> None:
        (tmp_path / "f.gguf").write_bytes(b"GGUF" + bytes(100))
        assert main(["verify", str(tmp_path / "f.gguf")]) == 3
        assert "it is a GGUF file" in capsys.readouterr().err
