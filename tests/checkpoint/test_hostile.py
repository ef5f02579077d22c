"""Checkpoints that an attacker has made: refused in little memory and time."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
import xxhash

import aiostage
from aiostage import CheckpointCorruptError, CheckpointMismatchError, HostMemoryError
from aiostage.checkpoint.verify import outline_of, verify

TERABYTE = 1 << 40
MAX_PART_BYTES = 64 << 20
"""The longest parts that a manifest may name."""


def digest(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def write_manifest(directory: Path, files: list[dict[str, Any]], nodes: list[str], **about: Any) -> None:
    first = {
        "format": "aiostage",
        "version": 1,
        "nbytes": 0,
        "leaves": 1,
        "part_bytes": MAX_PART_BYTES,
        "digest_of_parts": "xxh3_64",
    } | about
    text = json.dumps(first, separators=(",", ":"))[:-1] + ',\n"files":[\n'
    text += ",\n".join(json.dumps(file, separators=(",", ":")) for file in files)
    text += '\n],"nodes":[\n' + ",\n".join(nodes) + "\n"
    (directory / "manifest.json").write_text(text + f'],"digest":"{digest(text.encode())}"}}\n')


def write_sparse(directory: Path) -> None:
    """Write a tensor of a terabyte that takes no room on the disk, with all its digests right."""
    name = directory / "model.safetensors"
    size = TERABYTE - 4096
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode().ljust(4088)
    first = (4088).to_bytes(8, "little") + header
    with name.open("wb") as file:
        file.write(first)
        file.truncate(TERABYTE)
    digests = [digest(first + bytes(MAX_PART_BYTES - 4096))]
    digests += [digest(bytes(MAX_PART_BYTES))] * (TERABYTE // MAX_PART_BYTES - 1)
    record = {"name": name.name, "nbytes": TERABYTE, "digests": digests}
    write_manifest(
        directory, [record], ['{"is":"tensor","name":"a"}', '{"is":"dict","items":{"a":[0]}}', '{"root":[1]}']
    )


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.asyncio
async def test_a_terabyte_of_nothing(tmp_path: Path) -> None:
    write_sparse(tmp_path)
    assert os.stat(tmp_path / "model.safetensors").st_blocks < 100
    before, begin = peak_bytes(), process_time()
    with pytest.raises(HostMemoryError, match="no memory for the tensor 'a'"):
        await aiostage.load(tmp_path)
    for in_place in (False, True):
        with pytest.raises(CheckpointMismatchError, match="1099511623680"):
            await aiostage.load(tmp_path, into={"a": torch.zeros(3, dtype=torch.uint8)}, in_place=in_place)
    assert (await outline_of(tmp_path)).records["a"].shape == (TERABYTE - 4096,)
    assert process_time() - begin < 20
    assert peak_bytes() - before < 8 * MAX_PART_BYTES


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "about", [{"part_bytes": 2 * MAX_PART_BYTES}, {"part_bytes": 0}, {"part_bytes": -4096}, {"part_bytes": "a"}]
)
async def test_parts_of_any_size(about: dict[str, Any], tmp_path: Path) -> None:
    write_manifest(tmp_path, [], ['{"root":1}'], **about)
    with pytest.raises(CheckpointCorruptError, match="not a manifest"):
        await aiostage.load(tmp_path)


NODES: list[list[str]] = [
    # Views of nothing, of what is not there, of more than there is, and of more than there can be.
    ['{"is":"tensor","name":"c"}', '{"root":[0]}'],
    [
        '{"is":"tensor","name":"a","dtype":"float32","shape":[4611686018427387903],"stride":[1],"offset":0}',
        '{"root":[0]}',
    ],
    ['{"is":"tensor","name":"a","dtype":"float32","shape":[3],"stride":[4611686018427387903]}', '{"root":[0]}'],
    ['{"is":"tensor","name":"a","dtype":"float32","shape":[3],"stride":[1],"offset":-1}', '{"root":[0]}'],
    ['{"is":"tensor","name":"a","dtype":"quint8"}', '{"root":[0]}'],
    ['{"is":"tensor","name":"a","dtype":"load"}', '{"root":[0]}'],
    # References to nodes that are not there, or not yet.
    ['{"is":"list","of":[[7]]}', '{"root":[0]}'],
    ['{"is":"tuple","of":[[0]]}', '{"root":[0]}'],
    ['{"is":"list","of":[[-1]]}', '{"root":[0]}'],
    ['{"is":"list","of":[[true]]}', '{"root":[0]}'],
    ['{"is":"dict","pairs":[[[1],1]]}', '{"is":"list"}', '{"root":[0]}'],
    # Values in place of mappings.
    ['{"is":"dict","of":[1]}', '{"root":[0]}'],
    ['{"of":[1]}', '{"root":[0]}'],
    ['{"is":["dict"]}', '{"root":[0]}'],
    # Layouts that contradict each other, put elements on top of each other, or take memory for each other.
    [
        '{"is":"tensor","name":"a","shape":[3,1],"stride":[2,1]}',
        '{"is":"tensor","name":"a","shape":[3,1],"stride":[3,1]}',
        '{"is":"list","of":[[0],[1]]}',
        '{"root":[2]}',
    ],
    [
        '{"is":"tensor","name":"a","shape":[3],"stride":[2]}',
        '{"is":"tensor","name":"a"}',
        '{"is":"list","of":[[0],[1]]}',
        '{"root":[2]}',
    ],
    ['{"is":"tensor","name":"a","shape":[3],"stride":[0]}', '{"root":[0]}'],
    ['{"is":"tensor","name":"b","shape":[2],"stride":[2]}', '{"root":[0]}'],
    # Sparse tensors without values.
    ['{"is":"sparse","shape":[3],"coalesced":true}', '{"root":[0]}'],
    # Bombs.
    ["[" * 100_000, '{"root":1}'],
    ['{"is":"list","of":' + "[" * 100_000 + "]" * 100_000 + "}", '{"root":[0]}'],
    ['{"is":"int","value":"' + "f" * 10_000_000 + 'g"}', '{"root":[0]}'],
    ['{"is":"more"}', '{"root":1}'],
    ['{"root":[0]}'],
]


@pytest.mark.asyncio
@pytest.mark.parametrize("number", range(len(NODES)))
async def test_trees_that_are_none(number: int, tmp_path: Path) -> None:
    tensors = {
        "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "b": {"dtype": "F64", "shape": [2], "data_offsets": [12, 28]},
    }
    data = (4088).to_bytes(8, "little") + json.dumps(tensors).encode().ljust(4088) + bytes(28)
    (tmp_path / "model.safetensors").write_bytes(data)
    write_manifest(
        tmp_path, [{"name": "model.safetensors", "nbytes": len(data), "digests": [digest(data)]}], NODES[number]
    )
    begin = process_time()
    for options in (
        {},
        {"into": {"a": torch.zeros(3)}},
        {"into": {"a": torch.zeros(3)}, "in_place": True},
        {"device": lambda path, like: None if "sparse" in NODES[number][0] else "meta"},
    ):
        with pytest.raises(CheckpointCorruptError) as caught:
            await aiostage.load(tmp_path, **options)
        assert caught.value.path == str(tmp_path / "manifest.json")
    assert process_time() - begin < 10


@pytest.mark.asyncio
async def test_verify_says_what_load_says(tmp_path: Path) -> None:
    info = await aiostage.save({"a": torch.ones(3)}, tmp_path / "checkpoint")
    assert list((await verify(info.path)).records) == ["a"]
    with (info.path / "model.safetensors").open("r+b") as file:
        file.seek(20)
        file.write(b"\x00")
    for call in (verify, aiostage.load, outline_of):
        with pytest.raises(CheckpointCorruptError, match="do not match their checksum") as caught:
            await call(info.path)
        assert caught.value.path == str(info.path / "model.safetensors")
