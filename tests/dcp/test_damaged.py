"""Manifests and metadata of DCP's checkpoints that were damaged or made by strangers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash

from aiostage import CheckpointCorruptError
from aiostage.dcp import StorageReader, StorageWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def refused(root: Path) -> None:
    reader = StorageReader(root)
    reader.reset("one")
    with pytest.raises(CheckpointCorruptError) as caught:
        reader.read_metadata()
    assert len(str(caught.value)) < 2048


@pytest.fixture
def root(tmp_path: Path) -> Path:
    dcp.save({"a": torch.ones(3)}, storage_writer=StorageWriter(tmp_path), checkpoint_id="one", no_dist=True)
    return tmp_path


def test_damaged_manifests(root: Path) -> None:
    file = root / "one" / "manifest.json"
    whole = file.read_bytes()
    chance = random.Random(7)
    texts = [
        b"", b"[]", b"null", b"3", b'"a"', b"[" * 100_000, b"{}", b'{"a":' * 50_000, b"\xff\xfe", b"x" * 1_000_000,
    ]  # fmt: skip
    about = json.loads(whole)
    for change in (
        {"version": True},
        {"version": 10**400},
        {"metadata": 3},
        {"metadata": {}},
        {"format": ["x"] * 9000},
    ):
        texts.append(json.dumps(about | change).encode())
    for change in ({"nbytes": 10**30}, {"nbytes": -1}, {"nbytes": "9"}, {"xxh3_64": None}, {"name": "/etc/passwd"}):
        texts.append(json.dumps(about | {"metadata": about["metadata"] | change}).encode())
    for _ in range(60):
        text = bytearray(whole)
        del text[chance.randrange(len(text))]
        texts.append(bytes(text))
    for text in texts:
        file.write_bytes(text)
        if text != whole and not harmless(text, about):
            refused(root)


def harmless(text: bytes, about: dict[str, Any]) -> bool:
    """Return whether a change only took a space away."""
    try:
        return bool(json.loads(text) == about)
    except (ValueError, RecursionError):
        return False


def test_metadata_that_is_none(root: Path) -> None:
    about = json.loads((root / "one" / "manifest.json").read_bytes())
    for data in (b"", b"no pickle", b"\x80\x04N.", b"\x80\x04K\x01."):
        (root / "one" / ".metadata").write_bytes(data)
        about["metadata"] |= {"nbytes": len(data), "xxh3_64": xxhash.xxh3_64_hexdigest(data)}
        (root / "one" / "manifest.json").write_text(json.dumps(about))
        refused(root)
