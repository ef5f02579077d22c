"""What a stranger's file may cost: every reader refuses it soon, in little memory, with a short error of ours."""

from __future__ import annotations

import json
import os
import socket
import tracemalloc
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch

import aiostage
from aiostage import CheckpointCorruptError
from tests.checkpoint.test_hostile import digest, peak_bytes, write_manifest

pytestmark = pytest.mark.one_loop

SECONDS = 20
MEBIBYTE = 1 << 20


def write(directory: Path, nodes: list[str], header: dict[str, Any] | None = None, **about: Any) -> None:
    """Write a checkpoint with all digests right: a tensor ``a`` of three floats unless told, and nodes."""
    tensors = {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}} if header is None else header
    text = json.dumps(tensors).encode()
    text = text.ljust(-(-len(text) // 4096) * 4096)
    data = len(text).to_bytes(8, "little") + text + bytes(12)
    (directory / "model.safetensors").write_bytes(data)
    digests = [digest(data[start : start + (64 << 20)]) for start in range(0, len(data), 64 << 20)]
    write_manifest(directory, [{"name": "model.safetensors", "nbytes": len(data), "digests": digests}], nodes, **about)


async def refused(directory: Path, most_bytes: int = 64 * MEBIBYTE, **options: Any) -> CheckpointCorruptError:
    begin = process_time()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointCorruptError) as caught:
            await aiostage.load(directory, **options)
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()
    assert process_time() - begin < SECONDS
    assert len(str(caught.value)) < 2048
    return caught.value


def nested(depth: int) -> list[str]:
    return ['{"is":"tuple"}'] + [f'{{"is":"tuple","of":[[{index}]]}}' for index in range(depth)]


def doubled(depth: int) -> list[str]:
    return ['{"is":"tuple"}'] + [f'{{"is":"tuple","of":[[{index}],[{index}]]}}' for index in range(depth)]


def holding(lines: list[str], how: str) -> list[str]:
    last = len(lines) - 1
    container = {
        "set": f'{{"is":"set","of":[[{last}]]}}',
        "frozenset": f'{{"is":"frozenset","of":[[{last}]]}}',
        "key": f'{{"is":"dict","pairs":[[[{last}],1]]}}',
        "Counter": f'{{"is":"Counter","pairs":[[[{last}],1]]}}',
    }[how]
    return [*lines, container, f'{{"root":[{last + 1}]}}']


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["set", "frozenset", "key", "Counter"])
@pytest.mark.parametrize("lines", [nested(20_000), doubled(60)], ids=["deep", "doubled"])
async def test_what_takes_too_long_to_hash(lines: list[str], how: str, tmp_path: Path) -> None:
    write(tmp_path, holding(lines, how))
    assert "is hashed and too large" in str(await refused(tmp_path))


@pytest.mark.asyncio
async def test_deep_tuples_that_are_not_hashed_come_back(tmp_path: Path) -> None:
    write(tmp_path, [*nested(20_000), '{"root":[20000]}'])
    loaded, depth = await aiostage.load(tmp_path), 0
    while loaded:
        (loaded,), depth = loaded, depth + 1
    assert depth == 20_000


PRIME = (1 << 61) - 1
"""Multiples of it all have the hash 0."""


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["set", "frozenset", "dict"])
async def test_many_of_one_hash(how: str, tmp_path: Path) -> None:
    count = 20_000
    lines = [f'{{"is":"int","value":"{number * PRIME:x}"}}' for number in range(1, count + 1)]
    lines.append(f'{{"is":"{how}"}}')
    for start in range(0, count, 500):
        numbers = range(start, start + 500)
        if how == "dict":
            lines.append(json.dumps({"is": "more", "pairs": [[[number], 1] for number in numbers]}))
        else:
            lines.append(json.dumps({"is": "more", "of": [[number] for number in numbers]}))
    write(tmp_path, [*lines, f'{{"root":[{count}]}}'])
    assert "same hash" in str(await refused(tmp_path, 128 * MEBIBYTE))


HUGE = "9" * 4000


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "node",
    [
        f'{{"is":"tensor","name":"a","shape":[{HUGE}]}}',
        f'{{"is":"tensor","name":"a","shape":[{",".join(["1"] * 20_000)}]}}',
        f'{{"is":"tensor","name":"a","shape":[{",".join([str(1 << 61)] * 1000)}],"stride":[1],"offset":0}}',
        f'{{"is":"tensor","name":"a","shape":[3],"stride":[{HUGE}]}}',
        '{"is":"tensor","name":"a","dtype":"compiler"}',
        '{"is":"torch","value":"_inductor"}',
        '{"is":"numpy","value":["(1000000000000,)f4","00"]}',
        f'{{"is":"list","of":[{HUGE}]}}',
        '{"is":"list","of":[{"a":1}]}',
        '{"is":"list","of":{"a":1}}',
        '{"is":"dict","items":[1]}',
        '{"is":"list","is":"list"}',
        '{"is":"list","of":[NaN]}',
    ],
)
async def test_numbers_and_names_without_bounds(node: str, tmp_path: Path) -> None:
    write(tmp_path, [node, '{"root":[0]}'])
    await refused(tmp_path)
    await refused(tmp_path, device="meta")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [int(HUGE)], "data_offsets": [0, 12]}},
        {"a": {"dtype": "F32", "shape": [1] * 300_000, "data_offsets": [0, 12]}},
        {"a": {"dtype": "F32", "shape": [1 << 61] * 1000, "data_offsets": [0, 12]}},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, int(HUGE)]}},
        {"a" * 1_000_000: {"dtype": "F33", "shape": [3], "data_offsets": [0, 12]}},
        {"a": {"dtype": "F32", "shape": "x" * 1_000_000, "data_offsets": [0, 12]}},
    ],
)
async def test_headers_without_bounds(header: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, ['{"is":"tensor","name":"a"}', '{"root":[0]}'], header)
    await refused(tmp_path)


@pytest.mark.asyncio
@pytest.mark.parametrize("line", ["{}", '{"is":"list"}', '{"is":"deque","maxlen":null}'])
async def test_more_nodes_than_files_can_hold(line: str, tmp_path: Path) -> None:
    write(tmp_path, [*[line] * 1_000_100, '{"root":[0]}'])
    before = peak_bytes()
    with pytest.raises(CheckpointCorruptError, match="nodes"):
        await aiostage.load(tmp_path)
    assert peak_bytes() - before < 1024 * MEBIBYTE


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "about",
    [
        {"version": True},
        {"version": 1.0},
        {"nbytes": 10**400},
        {"nbytes": -1},
        {"leaves": "many"},
        {"format": "x" * 1_000_000},
    ],
)
async def test_about(about: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, ['{"root":1}'], **about)
    await refused(tmp_path)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 300, "a" * 1_000_000, "../a", ".a", "a/b", "", 3, None])
async def test_names_of_files(name: Any, tmp_path: Path) -> None:
    write_manifest(tmp_path, [{"name": name, "nbytes": 1, "digests": [digest(b"a")]}], ['{"root":1}'])
    await refused(tmp_path)


@pytest.mark.asyncio
@pytest.mark.parametrize("nbytes", [10**400, -1, 1.0, True])
async def test_sizes_of_files(nbytes: Any, tmp_path: Path) -> None:
    write_manifest(tmp_path, [{"name": "a", "nbytes": nbytes, "digests": [digest(b"a")]}], ['{"root":1}'])
    await refused(tmp_path)


@pytest.mark.asyncio
@pytest.mark.parametrize("source", ["a\0b", "\ud800", "x" * 300, "step-" + "0" * 300, "..", "/etc", "other", 3])
async def test_references_name_steps_and_nothing_else(source: Any, tmp_path: Path) -> None:
    name = "step-00000001"
    (tmp_path / name).mkdir()
    write_manifest(
        tmp_path / name,
        [],
        ['{"root":1}'],
        version=2,
        digest_of_blocks="xxh3_128",
        block_bytes=1 << 20,
        sources=[[source, "model.safetensors", 12]],
    )
    await refused(tmp_path / name)


@pytest.mark.asyncio
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", ["link", "loop", "socket", "fifo", "directory", "memory", "device"])
async def test_what_is_no_file_is_not_opened(kind: str, verify: bool, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    write(directory, ['{"is":"tensor","name":"a"}', '{"root":[0]}'])
    file = directory / "model.safetensors"
    file.rename(tmp_path / "outside")
    with socket.socket(socket.AF_UNIX) as unix:
        if kind == "socket":
            before = os.getcwd()
            os.chdir(directory)
            unix.bind(file.name)
            os.chdir(before)
        elif kind == "fifo":
            os.mkfifo(file)
        elif kind == "directory":
            file.mkdir()
        else:
            targets = {"link": "../outside", "loop": file.name, "memory": "/proc/self/mem", "device": "/dev/zero"}
            file.symlink_to(targets[kind])
        error = await refused(directory, verify=verify)
    assert error.path == str(file)


@pytest.mark.asyncio
async def test_a_mismatch_of_long_paths_is_short(tmp_path: Path) -> None:
    lines = [json.dumps({"is": "dict", "items": {f"{number}" + "k" * 5000: 1 for number in range(100)}})]
    write(tmp_path, [*lines, '{"root":[0]}'])
    with pytest.raises(aiostage.CheckpointMismatchError) as caught:
        await aiostage.load(tmp_path, into={"a": torch.zeros(3)})
    assert len(caught.value.unexpected) == 100
    assert len(str(caught.value)) < 4096
