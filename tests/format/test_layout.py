"""Which tensor goes into which file and where, and which leaves share memory: by themselves, without a disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiostage.format.layout import SINGLE_NAME, FileTensor, TensorFile, _in_order, index_content, tensor_files


def file_tensor(name: str, nbytes: int, element_bytes: int = 1) -> FileTensor:
    memory = torch.zeros(nbytes, dtype=torch.uint8)
    return FileTensor(name, "U8", (nbytes,), nbytes, element_bytes, memory, memory)


def files(tensors: Sequence[FileTensor], max_shard_bytes: int) -> list[TensorFile]:
    return tensor_files(tensors, max_shard_bytes)


def header(file: TensorFile) -> dict[str, Any]:
    raw = bytes(file.contents[0].numpy())  # type: ignore[union-attr]
    assert int.from_bytes(raw[:8], "little") == len(raw) - 8
    return json.loads(raw[8:])  # type: ignore[no-any-return]


def names(found: Sequence[TensorFile]) -> list[list[str]]:
    return [[tensor.name for tensor in file.tensors] for file in found]


def test_one_file_is_called_as_other_programs_expect() -> None:
    (file,) = files([file_tensor("a", 10), file_tensor("b", 20)], 30)
    assert file.name == SINGLE_NAME


def test_no_tensors_are_one_file_without_tensors() -> None:
    (file,) = files([], 100)
    assert file.name == SINGLE_NAME
    assert set(header(file)) <= {"__metadata__"}


def test_shards_are_filled_in_the_order_of_the_tree() -> None:
    found = files([file_tensor(name, 40) for name in "abcde"], 100)
    assert [file.name for file in found] == [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    assert names(found) == [["a", "b"], ["c", "d"], ["e"]]


def test_a_tensor_that_is_too_large_has_a_file_of_its_own() -> None:
    found = files([file_tensor("a", 10), file_tensor("large", 500), file_tensor("b", 10)], 100)
    assert names(found) == [["a"], ["large"], ["b"]]


def test_larger_elements_come_first_so_that_all_are_aligned() -> None:
    tensors = [file_tensor("a", 3, 1), file_tensor("b", 16, 8), file_tensor("c", 6, 2), file_tensor("d", 8, 8)]
    (file,) = files(tensors, 1000)
    assert names([file]) == [["b", "d", "c", "a"]]
    entries = {name: entry for name, entry in header(file).items() if name != "__metadata__"}
    position = 0
    for tensor in file.tensors:
        start, stop = entries[tensor.name]["data_offsets"]
        assert (start, stop - start) == (position, tensor.nbytes)
        assert start % tensor.element_bytes == 0
        position = stop


def test_neighbours_in_memory_become_one_piece() -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    address = memory.data_ptr()
    tensors = [FileTensor(f"t{n}", "U8", (1024,), 1024, 1, address + 1024 * n, memory) for n in range(1024)]
    (file,) = files(tensors, 1 << 30)
    assert len(file.contents) == 2
    apart = [FileTensor(f"t{n}", "U8", (1024,), 1024, 1, address + 2048 * n, memory) for n in range(4)]
    (file,) = files(apart, 1 << 30)
    assert len(file.contents) == 5


def test_the_index_says_which_tensor_is_where() -> None:
    found = files([file_tensor(name, 40) for name in ("a", "b", 'with "quotes"')], 50)
    (content,) = index_content(found)
    index = json.loads(bytes(content.numpy()))
    assert index["metadata"]["total_size"] == 120
    assert index["weight_map"] == {tensor.name: file.name for file in found for tensor in file.tensors}


@given(st.lists(st.tuples(st.sampled_from((1, 2, 4, 8)), st.integers(0, 12)), max_size=30))
def test_tensors_are_sorted_by_elements_and_then_by_memory(described: list[tuple[int, int]]) -> None:
    memory = range(4, 9)
    tensors = [FileTensor(str(i), "U8", (8,), 8, size, at, None) for i, (size, at) in enumerate(described)]
    found = _in_order(tensors, memory)
    keys = [(-size, at - memory.start if at in memory else len(memory)) for size, at in described]
    assert [int(tensor.name) for tensor in found] == sorted(range(len(keys)), key=keys.__getitem__)


@pytest.mark.parametrize("memory", [None, range(1, 10_001)])
def test_tensors_are_sorted_in_steps(memory: range | None) -> None:
    tensors = [FileTensor("", "U8", (1,), 1, 1, 1 + place, None) for place in range(10_000)]
    assert sum(1 for _ in _in_order(tensors, memory)) >= 10_000 / 256
