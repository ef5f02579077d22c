"""Checkpoints of DCP that name code to run."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import io
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path, PosixPath, PurePath
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as torch_metadata

import aiostage.dcp
from aiostage import CheckpointCorruptError, RankFailedError
from aiostage.dcp import StorageReader, StorageWriter
from aiostage.dcp.records import Record
from aiostage.dcp.unpickling import read_metadata

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Hostile:
    def __reduce__(self) -> Any:
        return exec, ("__import__('os').environ['AIOSTAGE_TEST_RAN'] = '1'",)


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    monkeypatch.setenv("AIOSTAGE_TEST_RAN", "0")
    return lambda: os.environ["AIOSTAGE_TEST_RAN"] == "1"


def save(state: dict[str, Any], root: Path) -> None:
    asyncio.run(aiostage.dcp.save(state, checkpoint_id="one", storage_writer=StorageWriter(root), no_dist=True))


def load(state: dict[str, Any], root: Path, **options: Any) -> None:
    asyncio.run(
        aiostage.dcp.load(state, checkpoint_id="one", storage_reader=StorageReader(root), no_dist=True, **options)
    )


def test_code_in_the_metadata_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: Callable[[], bool]
) -> None:
    # With its own size and checksum in the manifest, as the author of a checkpoint can make them.
    with monkeypatch.context() as patch:
        dumps = pickle.dumps
        patch.setattr(pickle, "dumps", lambda value, *rest: dumps(Hostile(), *rest))
        dcp.save({"a": torch.ones(3)}, storage_writer=StorageWriter(tmp_path), checkpoint_id="one", no_dist=True)
    reader = StorageReader(tmp_path)
    reader.reset("one")
    with pytest.raises(CheckpointCorruptError, match=r"it names builtins\.exec"):
        reader.read_metadata()
    assert not ran()


def test_a_record_leads_to_no_file_outside_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dumps = pickle.dumps

    def leading_out(metadata: Any, *rest: Any) -> bytes:
        metadata.storage_data = {
            index: dataclasses.replace(record, file="../elsewhere.bin")
            for index, record in metadata.storage_data.items()
        }
        return dumps(metadata, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pickle, "dumps", leading_out)
        dcp.save({"a": torch.ones(3)}, storage_writer=StorageWriter(tmp_path), checkpoint_id="one", no_dist=True)
    # The bytes there match the digest: only the name is wrong.
    (tmp_path / "elsewhere.bin").write_bytes((tmp_path / "one" / "rank-00000.bin").read_bytes())
    live = {"a": torch.zeros(3)}
    with pytest.raises(RankFailedError, match=r"'\.\./elsewhere\.bin' is not a plain name for a file"):
        load(live, tmp_path)
    assert not live["a"].any()


def test_code_in_a_value_runs_only_if_it_may(tmp_path: Path, ran: Callable[[], bool]) -> None:
    dcp.save(
        {"a": torch.ones(3), "b": Hostile()},
        storage_writer=StorageWriter(tmp_path),
        checkpoint_id="one",
        no_dist=True,
    )
    live = {"a": torch.zeros(3), "b": 0}
    with pytest.raises(RankFailedError, match="weights_only"):
        load(live, tmp_path)
    assert not ran()
    load(live, tmp_path, weights_only=False)
    assert ran()


@pytest.mark.parametrize(
    "name",
    ["pathlib\nPurePath", "torch.distributed.checkpoint.metadata\nMetadata", "collections\nOrderedDict", "torch\nSize"],
)
def test_a_pickle_changes_no_class(name: str) -> None:
    # BUILD with a state of slots: it sets an attribute of the class itself.
    data = b"\x80\x02c" + name.encode() + b"\nN}X\x05\x00\x00\x00spoilK\x05s\x86b."
    with pytest.raises((TypeError, ValueError)):
        read_metadata(data, Record)
    classes = (PurePath, torch_metadata.Metadata, collections.OrderedDict, dict, torch.Size)
    assert not any(hasattr(cls, "spoil") for cls in classes)


def test_metadata_is_made_once_however_often_it_is_referred_to() -> None:
    # 2**60 tuples, if each were made as often as it is met.
    nested: Any = torch_metadata.MetadataIndex("a")
    for _ in range(60):
        nested = (nested, nested)
    found = read_metadata(pickle.dumps(torch_metadata.Metadata({}, planner_data=nested)), Record)
    assert found.planner_data[0] is found.planner_data[1]


def test_plain_values_come_back(tmp_path: Path) -> None:
    values = {
        "array": np.arange(5, dtype=np.int16),
        "generator": np.random.get_state(legacy=False),
        "number": np.float64(0.5),
        "when": np.datetime64("2026-01-01"),
        "ordered": collections.OrderedDict(a=1),
        "set": {1, 2},
        "complex": 1 + 2j,
        "bytes": b"abc",
        "tuple": (1, "two", None, 3.0),
        "size": torch.Size([2]),
        "dtype": torch.bfloat16,
        "empty": {},
    }
    state = {"tensor": torch.ones(2), "nested": {3: [torch.zeros(1), 7]}, **values}
    save(state, tmp_path)
    live: dict[str, Any] = {"tensor": torch.zeros(2), "nested": {3: [torch.ones(1), 0]}, **dict.fromkeys(values)}
    live["generator"] = dict.fromkeys(values["generator"])
    live["generator"]["state"] = dict.fromkeys(values["generator"]["state"])
    live["ordered"], live["empty"] = collections.OrderedDict(a=0), {}
    load(live, tmp_path)
    assert repr(live) == repr(state)


def test_the_kinds_of_metadata(tmp_path: Path) -> None:
    metadata = dcp.metadata.Metadata(
        state_dict_metadata={
            str(layout): dcp.metadata.TensorStorageMetadata(
                dcp.metadata.TensorProperties(torch.bfloat16, layout, memory_format=memory_format),
                torch.Size([3]),
                [dcp.metadata.ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))],
            )
            for layout, memory_format in (
                (torch.strided, torch.contiguous_format),
                (torch.sparse_coo, torch.channels_last),
            )
        },
        planner_data={"a": ("a", 3)},
        storage_data={dcp.metadata.MetadataIndex("a"): Record("file", 0, 1, "x", torch.int8, (1,))},
        storage_meta=dcp.metadata.StorageMeta(checkpoint_id=PosixPath("one")),
    )
    written = pickle.dumps(metadata, 2)
    assert read_metadata(written, Record) == metadata
    # As each Python writes it.
    path, module = b"cpathlib\nPosixPath\n", sys.modules[PosixPath.__module__].__name__.encode()
    assert b"c" + module + b"\nPosixPath\n" in written
    for name in (b"pathlib", b"pathlib._local"):
        other = written.replace(b"c" + module + b"\nPosixPath\n", path.replace(b"pathlib", name))
        assert read_metadata(other, Record) == metadata
    with pytest.raises(pickle.UnpicklingError, match=r"it names _io\.BytesIO"):
        read_metadata(pickle.dumps(io.BytesIO()), Record)


def test_metadata_names_records_as_older_checkpoints_do() -> None:
    """The name is part of the format, wherever the class lies."""
    pickled = pickle.dumps(Record("rank-00000.bin", 0, 0, "", None, ()), protocol=2)
    assert b"aiostage.dcp.storage\nRecord\n" in pickled
    assert type(pickle.loads(pickled)) is Record
