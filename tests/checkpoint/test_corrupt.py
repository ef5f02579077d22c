from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import aiostage
from aiostage import CheckpointCorruptError, CheckpointNotFoundError
from tests.checkpoint.comparing import assert_same, span

MANIFEST = "manifest.json"


def tree() -> dict[Any, Any]:
    base = torch.arange(40, dtype=torch.float32)
    return {
        "tied": [base, base[3:7], base.view(4, 10).t()],
        "turned": torch.arange(6, dtype=torch.int16).view(2, 3).t(),
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "sparse": torch.eye(3).to_sparse(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "values": (None, 1 << 70, 0.5, b"bytes", {1: "one"}, {2, 3}, torch.Size([1]), float("nan")),
    }


WHOLE: dict[str, bytes] = {}


async def make(parent: Path) -> Path:
    """Make a checkpoint of two shards and an index, written once and copied for each example."""
    target = parent / "checkpoint"
    if not WHOLE:
        await aiostage.save(tree(), parent / "whole", max_shard_bytes=200)
        WHOLE.update((file.name, file.read_bytes()) for file in sorted((parent / "whole").iterdir()))
        assert len(WHOLE) == 4
    target.mkdir(exist_ok=True)
    for name, data in WHOLE.items():
        (target / name).write_bytes(data)
    return target


def digest(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def seal(directory: Path, change: Callable[[list[Any]], object] = lambda nodes: None) -> None:
    """Change the nodes of a manifest, and make every size and digest right again."""
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest["nodes"])
    for file in manifest["files"]:
        data = (directory / file["name"]).read_bytes()
        file["nbytes"], file["digests"] = len(data), [digest(data)]
    about = {name: value for name, value in manifest.items() if name not in ("files", "nodes", "digest")}
    text = dump(about)[:-1] + ',\n"files":[\n' + ",\n".join(map(dump, manifest["files"]))
    text += '\n],"nodes":[\n' + ",\n".join(map(dump, manifest["nodes"])) + "\n"
    (directory / MANIFEST).write_text(text + f'],"digest":"{digest(text.encode())}"}}\n')


def dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


async def corrupt(directory: Path, name: str) -> CheckpointCorruptError:
    """Return the error of loading a damaged checkpoint, which has to name the file."""
    with pytest.raises(CheckpointCorruptError) as caught:
        await aiostage.load(directory)
    assert caught.value.path == str(directory / name)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return caught.value


async def loads_or_says_so(directory: Path, **options: Any) -> None:
    """Load what may be damaged: nothing but a tree or a CheckpointCorruptError may come of it."""
    try:
        loaded = await aiostage.load(directory, **options)
    except CheckpointCorruptError as error:
        if error.path is None or not error.path.startswith(str(directory)):
            raise
        return
    for tensor in tensors_in(loaded):
        start, stop = span(tensor)
        storage = tensor.untyped_storage()
        assert start == stop or storage.data_ptr() <= start < stop <= storage.data_ptr() + storage.nbytes()


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    todo, seen = [tree], set[int]()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            todo += value
        elif isinstance(value, torch.Tensor) and value.layout is torch.strided:
            yield value


def flip(file: Path, position: int, mask: int) -> None:
    data = bytearray(file.read_bytes())
    data[position % len(data)] ^= mask
    file.write_bytes(data)


positions = st.integers(0, 1 << 20)
masks = st.integers(1, 255)


@pytest.mark.asyncio
async def test_is_whole_before_it_is_damaged(tmp_path: Path) -> None:
    directory = await make(tmp_path)
    assert_same(tree(), await aiostage.load(directory))
    seal(directory)
    assert_same(tree(), await aiostage.load(directory))


@pytest.mark.asyncio
@given(number=st.integers(0, 10), position=positions, mask=masks)
async def test_any_byte_of_any_file(number: int, position: int, mask: int, tmp_path: Path) -> None:
    directory = await make(tmp_path)
    files = sorted(directory.iterdir())
    file = files[number % len(files)]
    flip(file, position, mask)
    await corrupt(directory, file.name)
    await loads_or_says_so(directory, verify=False)


@pytest.mark.asyncio
@given(number=st.integers(0, 10), length=positions, longer=st.booleans())
async def test_truncated_and_extended_files(number: int, length: int, longer: bool, tmp_path: Path) -> None:
    directory = await make(tmp_path)
    files = sorted(directory.iterdir())
    file = files[number % len(files)]
    data = file.read_bytes()
    file.write_bytes(data + bytes(1 + length % 5000) if longer else data[: length % len(data)])
    await corrupt(directory, file.name)
    with pytest.raises(CheckpointCorruptError):
        await aiostage.load(directory, verify=False)


@pytest.mark.asyncio
async def test_missing_files(tmp_path: Path) -> None:
    directory = await make(tmp_path)
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        file.unlink()
        if file.name == MANIFEST:
            with pytest.raises(CheckpointNotFoundError, match=r"has no manifest\.json") as caught:
                await aiostage.load(directory)
            assert caught.value.path == str(directory)
        else:
            assert "missing" in str(await corrupt(directory, file.name))
        file.write_bytes(data)
    assert_same(tree(), await aiostage.load(directory))


@pytest.mark.asyncio
async def test_something_else_than_a_file(tmp_path: Path) -> None:
    directory = await make(tmp_path)
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        assert "regular" in str(await corrupt(directory, file.name))
        file.unlink()
        file.mkdir()
        if file.name == MANIFEST:
            # A directory without a manifest, which no listing counts either.
            with pytest.raises(CheckpointNotFoundError, match=r"has no manifest\.json"):
                await aiostage.load(directory)
        else:
            assert "regular" in str(await corrupt(directory, file.name))
        file.rmdir()
        file.write_bytes(data)


@pytest.mark.asyncio
async def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "nowhere/deeper", "file", "file/below", "dangling", "empty"):
        with pytest.raises(CheckpointNotFoundError) as caught:
            await aiostage.load(tmp_path / name)
        assert isinstance(caught.value, FileNotFoundError)
        assert caught.value.path is not None


@pytest.mark.asyncio
async def test_files_of_two_checkpoints(tmp_path: Path) -> None:
    directory, other = await make(tmp_path), tmp_path / "other"
    changed = tree()
    changed["tied"][0].add_(1)
    await aiostage.save(changed, other, max_shard_bytes=200)
    different = [
        file for file in directory.glob("*.safetensors") if file.read_bytes() != (other / file.name).read_bytes()
    ]
    assert different
    for file in different:
        shutil.copyfile(other / file.name, file)
    await corrupt(directory, min(different).name)


@pytest.mark.asyncio
async def test_a_newer_format(tmp_path: Path) -> None:
    directory = await make(tmp_path)
    file = directory / MANIFEST
    file.write_text(file.read_text().replace('"version":1', '"version":3'))
    assert "newer aiostage" in str(await corrupt(directory, MANIFEST))


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".hidden", "", "a\0b", 3])
async def test_names_that_lead_out_of_the_directory(name: Any, tmp_path: Path) -> None:
    directory = await make(tmp_path)
    manifest = json.loads((directory / MANIFEST).read_text())
    text = (directory / MANIFEST).read_text().replace(dump(manifest["files"][0]["name"]), dump(name))
    body = text[: text.rindex('],"digest"')]
    (directory / MANIFEST).write_text(body + f'],"digest":"{digest(body.encode())}"}}\n')
    assert "not a name of a file" in str(await corrupt(directory, MANIFEST))


@pytest.mark.asyncio
@given(number=st.integers(0, 10), position=positions, mask=masks)
async def test_a_damaged_file_whose_digest_is_right(number: int, position: int, mask: int, tmp_path: Path) -> None:
    directory = await make(tmp_path)
    files = sorted(directory.glob("*.safetensors"))
    # The beginning, where headers are not yet padding.
    flip(files[number % len(files)], position % 300, mask)
    seal(directory)
    await loads_or_says_so(directory)


ODD = [None, True, -1, 0, 1, 7, 1 << 40, (1 << 62) - 1, 1 << 70, 0.5, "", "x", "tensor", "set", "more", "float32", "0x"]
odd_values: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(ODD), lambda values: st.one_of(st.lists(values, max_size=3), st.just({})), max_leaves=3
)


def mutate(nodes: list[Any], number: int, key: int, value: Any) -> None:
    """Put a value in one place of one node."""
    node = nodes[number % len(nodes)]
    name = sorted(node)[key % len(node)]
    inner = node[name]
    if isinstance(inner, list) and inner and key % 3:
        inner[key % len(inner)] = value
    elif isinstance(inner, dict) and inner and key % 3:
        inner[sorted(inner)[key % len(inner)]] = value
    else:
        node[name] = value


@pytest.mark.one_loop
@pytest.mark.asyncio
@settings(max_examples=150)
@given(number=st.integers(0, 100), key=st.integers(0, 20), value=odd_values)
async def test_nodes_that_are_wrong_and_whose_digest_is_right(
    number: int, key: int, value: Any, tmp_path: Path
) -> None:
    directory = await make(tmp_path)
    seal(directory, lambda nodes: mutate(nodes, number, key, value))
    await loads_or_says_so(directory)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [{"root": [0]}],
        [{"is": "list", "of": [[5]]}, {"root": [0]}],
        [{"is": "list", "of": [[-1]]}, {"root": [0]}],
        [{"is": "tuple", "of": [[1]]}, {"is": "tuple", "of": [[0]]}, {"root": [0]}],
        [{"is": "set", "of": [[0]]}, {"root": [0]}],
        [{"is": "float", "value": "00"}, {"root": [0]}],
        [{"is": "float", "value": 3}, {"root": [0]}],
        [{"is": "complex", "value": ["00"]}, {"root": [0]}],
        [{"is": "bytes", "value": "?"}, {"root": [0]}],
        [{"is": "int", "value": "zz"}, {"root": [0]}],
        [{"is": "numpy", "value": ["O", "00"]}, {"root": [0]}],
        [{"is": "numpy", "value": ["<f4", "00"]}, {"root": [0]}],
        [{"is": "torch", "value": "load"}, {"root": [0]}],
        [{"is": "device", "value": "nowhere"}, {"root": [0]}],
        [{"is": "deque", "maxlen": -1}, {"root": [0]}],
        [{"is": "defaultdict", "factory": "eval"}, {"root": [0]}],
        [{"is": "dict", "pairs": [[[0], 1]]}, {"root": [0]}],
        [{"is": "tensor", "name": "nothing"}, {"root": [0]}],
        [{"is": "tensor", "name": "turned", "shape": [1 << 40], "stride": [0], "offset": 6}, {"root": [0]}],
        [{"is": "tensor", "name": "turned", "shape": [1 << 61], "stride": [1 << 61], "dtype": "int8"}, {"root": [0]}],
        [{"is": "tensor", "name": "turned", "dtype": "quint8"}, {"root": [0]}],
        [{"is": "tensor", "name": "turned", "class": "Parameter"}, {"root": [0]}],
        [{"is": "more", "of": [1]}, {"root": [0]}],
        [3, {"root": [0]}],
        ["text"],
    ],
    ids=dump,
)
async def test_nodes_that_describe_no_tree(nodes: list[Any], tmp_path: Path) -> None:
    directory = await make(tmp_path)

    def change(found: list[Any]) -> None:
        found[:] = nodes

    seal(directory, change)
    assert "tree" in str(await corrupt(directory, MANIFEST))


@pytest.mark.asyncio
async def test_a_manifest_of_deep_nesting(tmp_path: Path) -> None:
    directory = await make(tmp_path)
    file = directory / MANIFEST
    text = file.read_text()
    for line in ("[" * 100_000, "9" * 100_000, '{"is":' * 50_000):
        body = text[: text.index('"nodes":[\n') + len('"nodes":[\n')] + line + "\n"
        file.write_text(body + f'],"digest":"{digest(body.encode())}"}}\n')
        await corrupt(directory, MANIFEST)


@pytest.mark.asyncio
async def test_kinds_of_a_newer_version(tmp_path: Path) -> None:
    directory = await make(tmp_path)

    def change(found: list[Any]) -> None:
        found[:] = [{"is": "of tomorrow"}, {"is": "dict", "items": {"a": [0], "b": 1}}, {"root": [1], "kinds": 99}]

    seal(directory, change)
    message = str(await corrupt(directory, MANIFEST))
    assert "an object of kind 'of tomorrow', of version 99 of all kinds" in message
    assert "Read it with a newer aiostage" in message
    assert await aiostage.load(directory, only="b") == {"b": 1}


T = "turned"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "form",
    [
        {"is": "PosixPath", "of": [1]},
        {"is": "PosixPath"},
        {"is": "datetime", "value": [2020, 13, 1, 0, 0, 0, 0, 0], "of": [None]},
        {"is": "datetime", "value": [2020, 1, 1, 0, 0, 0, 0, 0], "of": ["UTC"]},
        {"is": "timedelta", "value": [10**400, 0, 0]},
        {"is": "ZoneInfo", "key": "../../etc/passwd"},
        {"is": "ZoneInfo", "key": "No/Where"},
        {"is": "UUID", "value": "x"},
        {"is": "Decimal", "value": "x"},
        {"is": "Decimal", "value": [0, [1], 2]},
        {"is": "Fraction", "of": [1, 0]},
        {"is": "range", "of": [1, 2, 0]},
        {"is": "range", "of": ["a", 2, 1]},
        {"is": "Random", "of": [1]},
        {"is": "BytesIO", "position": -1, "of": [[0]]},
        {"is": "BytesIO", "position": 0, "of": ["text"]},
        {"is": "array", "dtype": "O", "shape": [1], "of": [[0]]},
        {"is": "array", "dtype": "<f4,(2,)i4", "shape": [1], "of": [[0]]},
        {"is": "array", "dtype": "<U1", "shape": [10**400], "of": [[0]]},
        {"is": "array", "dtype": "<U1", "shape": [-1], "of": [[0]]},
        {"is": "array", "dtype": "<U999999999999", "shape": [1], "of": [[0]]},
        {"is": "array", "dtype": {"base": "<U1", "shape": [1 << 40]}, "shape": [], "of": [[0]]},
        {"is": "array", "dtype": {"names": ["a"], "formats": ["<f4"]}, "shape": [], "of": [[0]]},
        {"is": "np.generic", "dtype": "<M8[s]", "value": "00"},
        {"is": "np.generic", "dtype": "<M8[s", "value": "00"},
        {"is": "MaskedArray", "hard": True, "of": [1, 2, 3]},
        {"is": "BitGenerator", "generator": "eval", "of": [[0]]},
        {"is": "BitGenerator", "generator": "PCG64", "of": [5]},
        {"is": "np.random.Generator", "of": ["PCG64"]},
        {"is": "torch.Generator", "of": [[0]]},
        {"is": "torch.return_types", "name": "max", "of": [1]},
        {"is": "torch.return_types", "name": "__builtins__", "of": [1]},
        {"is": "TypedStorage", "dtype": "load", "of": [[0]]},
        {"is": "UntypedStorage", "of": [[0]]},
        {"is": "qscheme", "value": "torch.load"},
        {"is": "lazy", "name": "UninitializedParameter", "dtype": "load"},
        {"is": "jagged", "dimension": 1, "of": [[0], [0], None, None, None]},
        {"is": "enum", "type": 5, "name": None, "of": [1]},
        {"is": "object", "type": "a.B", "of": "anything"},
        {"is": "namedtuple", "type": "a.B", "fields": ["a"], "of": [1, 2]},
        {"is": "subclass", "type": "a.B", "of": [1]},
        {"is": "wrapper", "type": "a.B", "inner": ["a"], "of": [1, 2]},
        {"is": "registered", "type": "a.B", "of": []},
    ],
    ids=dump,
)
async def test_forms_that_describe_no_object(form: dict[str, Any], tmp_path: Path) -> None:
    directory = await make(tmp_path)

    def change(found: list[Any]) -> None:
        found[:] = [{"is": "tensor", "name": T}, form, {"root": [1]}]

    seal(directory, change)
    await corrupt(directory, MANIFEST)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["lazy", "TypedStorage"])
async def test_a_dtype_is_not_looked_up_in_torch(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which imports what is asked for, a compiler say."""
    directory, asked = await make(tmp_path), []
    monkeypatch.setattr(torch, "__getattr__", asked.append)

    def change(found: list[Any]) -> None:
        form = {"is": kind, "name": "UninitializedParameter", "dtype": "_dynamo_of_a_file", "of": []}
        found[:] = [{"is": "tensor", "name": T}, form, {"root": [1]}]

    seal(directory, change)
    await corrupt(directory, MANIFEST)
    assert "_dynamo_of_a_file" not in asked


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("MT19937", {"bit_generator": "MT19937", "state": {"key": np.zeros(624, np.uint32), "pos": 625}}),
        ("MT19937", {"bit_generator": "MT19937", "state": {"key": np.zeros(624, np.uint32), "pos": -1}}),
        ("MT19937", {"bit_generator": "MT19937", "state": {"key": np.zeros(3, np.uint32), "pos": 0}}),
        ("Philox", np.random.Philox(1).state | {"buffer_pos": -5}),
        ("Philox", np.random.Philox(1).state | {"buffer_pos": 5}),
    ],
)
@pytest.mark.parametrize("kind", ["BitGenerator", "RandomState"])
async def test_states_that_lead_out_of_a_generator(name: str, state: dict[str, Any], kind: str, tmp_path: Path) -> None:
    """NumPy takes them, and reads or writes memory that is not the generator's later."""
    directory = (await aiostage.save(state, tmp_path / "checkpoint")).path

    def change(found: list[Any]) -> None:
        # The tree is the state; it becomes the generator that has this state.
        root = found.pop()
        found += [{"is": kind, "generator": name, "of": [root["root"]]}, root | {"root": [len(found)]}]

    seal(directory, change)
    assert "generator" in str(await corrupt(directory, MANIFEST))
