from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from aiostage.errors import CheckpointCorruptError
from aiostage.format.safetensors import (
    DTYPES,
    HEADER_ALIGNMENT,
    TensorRecord,
    header_cost,
    read_header,
    write_header,
)


def header_of(*records: TensorRecord) -> bytes:
    return bytes(write_header(records))


def read(text: bytes | str, data_bytes: int) -> list[TensorRecord]:
    text = text.encode() if isinstance(text, str) else text
    return read_header(text, data_bytes, path="some/file")


def entry(dtype: str = "U8", shape: list[Any] | None = None, offsets: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [4] if shape is None else shape, "data_offsets": offsets or [0, 4]}


class TestWriteHeader:
    def test_ends_on_a_page(self):
        for count in (0, 1, 100):
            header = header_of(*(TensorRecord(f"t{i}", "U8", (1,), i, i + 1) for i in range(count)))
            assert len(header) % HEADER_ALIGNMENT == 0
            assert int.from_bytes(header[:8], "little") == len(header) - 8

    def test_is_opened_by_the_reference_implementation(self, tmp_path: Path):
        records = [
            TensorRecord("double", "F64", (2,), 0, 16),
            TensorRecord('odd "name"\n\\ ü €', "I16", (2, 1), 16, 20),
            TensorRecord("nothing", "F32", (0, 5), 20, 20),
            TensorRecord("scalar", "U8", (), 20, 21),
        ]
        file = tmp_path / "model.safetensors"
        file.write_bytes(header_of(*records) + bytes(range(21)))
        found = load_file(file)
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == {
            record.name: (DTYPES[record.dtype], record.shape) for record in records
        }
        assert found["scalar"] == 20
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "writer": "aiostage"}

    @pytest.mark.parametrize("name", DTYPES)
    def test_every_dtype_is_opened_by_the_reference_implementation(self, tmp_path: Path, name: str):
        size = 3 * DTYPES[name].itemsize
        file = tmp_path / "model.safetensors"
        file.write_bytes(header_of(TensorRecord("x", name, (3,), 0, size)) + bytes(size))
        assert load_file(file)["x"].dtype is DTYPES[name]

    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), unique=True), st.integers(0, 3))
    def test_costs_no_more_than_estimated_and_is_read_back(self, names: list[str], dims: int):
        names = [name for name in names if name != "__metadata__"]
        shape = (1 << 15,) * dims
        size = 2 << 15 * dims
        records = [TensorRecord(name, "I16", shape, i * size, (i + 1) * size) for i, name in enumerate(names)]
        header = header_of(*records)
        assert len(header) <= sum(header_cost(name, shape) for name in names) + 2 * HEADER_ALIGNMENT
        assert read(header[8:], size * len(names)) == records


class TestReadHeader:
    def test_sorts_records_by_their_data(self):
        text = json.dumps({"b": entry(offsets=[4, 8]), "__metadata__": {"a": "b"}, "a": entry()})
        assert [record.name for record in read(text, 8)] == ["a", "b"]

    def test_takes_empty_tensors_where_others_start(self):
        text = json.dumps({"full": entry(), "empty": entry(shape=[0], offsets=[0, 0])})
        assert [record.name for record in read(text, 4)] == ["empty", "full"]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            "null",
            "nonsense",
            '{"a"}',
            '{"a":}',
            '{"a":1}',
            '{"a" 1}',
            "{1:2}",
            '{"a":{}}{',
            json.dumps({"a": entry()})[:-1] + ",}",
            json.dumps({"a": entry()})[:-1],
            json.dumps({"a": entry()}) + "x}",
            json.dumps({"a": entry(), "b": entry()}),
            json.dumps({"a": entry(offsets=[1, 5])}),
            json.dumps({"a": entry(), "b": entry(offsets=[5, 9])}),
            json.dumps({"a": entry(), "b": entry(offsets=[3, 7])}),
            json.dumps({"a": entry(offsets=[0, 5])}),
            json.dumps({"a": entry(dtype="F33")}),
            json.dumps({"a": entry(dtype=["U8"])}),  # type: ignore[arg-type]
            json.dumps({"a": entry(shape=[-4])}),
            json.dumps({"a": entry(shape=[2.0, 2])}),
            json.dumps({"a": entry(shape=[True, 4])}),
            json.dumps({"a": entry(shape="4")}),  # type: ignore[arg-type]
            json.dumps({"a": entry(offsets=[4, 0])}),
            json.dumps({"a": entry(offsets=[0, 4, 4])}),
            json.dumps({"a": entry() | {"more": 1}}),
            '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"dtype":"U8"}}',
            json.dumps({"a": entry(shape=[1 << 62, 1 << 62], offsets=[0, 1 << 124])}),
            '{"a":' + json.dumps(entry()) + ',"a":' + json.dumps(entry()) + "}",
            '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
            '{"a":' + "9" * 10_000 + "}",
            b'{"\xff":1}',
        ],
    )
    def test_refuses_what_is_wrong(self, text: str | bytes):
        with pytest.raises(CheckpointCorruptError) as caught:
            read(text, 4)
        assert caught.value.path == "some/file"
        assert "header" in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    @given(st.data())
    def test_a_member_means_the_same_after_others_of_its_kind(self, data: st.DataObject):
        # Members of a dtype and a shape that were checked before are read in another way.
        first = '"first":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4]}'
        member = list('"a":{"dtype":"U8","shape":[2,2],"data_offsets":[4,8]}')
        for _ in range(data.draw(st.integers(0, 2))):
            position = data.draw(st.integers(0, len(member) - 1))
            member[position : position + data.draw(st.integers(0, 2))] = data.draw(
                st.text(st.sampled_from('0248é٤ "\\\x01,:{}[]-.eU_'), max_size=3)
            )
        alone = "{" + first + ", " + "".join(member) + "}"
        behind = "{" + first + "," + "".join(member) + "}"
        try:
            expected = read(alone, 8)
        except CheckpointCorruptError:
            with pytest.raises(CheckpointCorruptError):
                read(behind, 8)
        else:
            assert read(behind, 8) == expected

    @pytest.mark.parametrize("offsets", ["04,8", "4,08", "٤,8", "4,9", "4,8.0", "-4,8", "4,4", "8,4"])
    def test_refuses_wrong_offsets_after_others_of_a_kind(self, offsets: str):
        members = [
            f'"{name}":{{"dtype":"U8","shape":[4],"data_offsets":[{at}]}}'
            for name, at in (("a", "0,4"), ("b", offsets))
        ]
        with pytest.raises(CheckpointCorruptError):
            read("{" + ",".join(members) + "}", 8)

    def test_metadata_are_no_tensor_whatever_they_look_like(self):
        member = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
        assert [record.name for record in read(f'{{"a":{member},"__metadata__":{member}}}', 4)] == ["a"]

    def test_refuses_data_that_nothing_describes(self):
        with pytest.raises(CheckpointCorruptError, match="4 bytes of data, not 5"):
            read(json.dumps({"a": entry()}), 5)

    @given(st.data())
    def test_a_damaged_header_is_refused_or_says_the_same(self, data: st.DataObject):
        records = [TensorRecord("a", "U8", (4,), 0, 4), TensorRecord("bb", "F32", (2, 1), 4, 12)]
        header = bytearray(header_of(*records)[8:].rstrip())
        position = data.draw(st.integers(0, len(header) - 1))
        header[position] ^= 1 << data.draw(st.integers(0, 7))
        try:
            found = read(bytes(header), 12)
        except CheckpointCorruptError:
            return
        assert sum(record.stop - record.start for record in found) == 12


def test_records_of_shapes_that_torch_has():
    assert {dtype.itemsize for dtype in DTYPES.values()} == {1, 2, 4, 8}
    assert all(isinstance(dtype, torch.dtype) for dtype in DTYPES.values())
