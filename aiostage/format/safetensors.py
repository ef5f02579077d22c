"""The safetensors format: which dtypes it knows, how a header is written, and how one is read with suspicion."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from json.encoder import encode_basestring
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from aiostage._loop.workers import releasing_gil
from aiostage.errors import CheckpointCorruptError, said, shown

__all__ = [
    "CARRIERS",
    "DTYPES",
    "DTYPE_NAMES",
    "HEADER_ALIGNMENT",
    "HEADER_LENGTH_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_RANK",
    "MAX_SPREAD",
    "MAX_TENSOR_NAME",
    "METADATA",
    "TensorRecord",
    "checked_sizes",
    "contiguous_strides",
    "elements_in",
    "header_cost",
    "is_injective",
    "read_header",
    "unique_members",
    "write_header",
]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The names that ``safetensors.torch.load_file`` opens. The format has a few more, which it does not."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Dtypes that torch can copy, by element size; the bytes are all that counts."""

MAX_SPREAD = 4
"""Leaves whose memory is at most this many times their elements are written as elements, without the gaps. A guess. It
also limits how much memory a file may ask for, in proportion to its own size."""

_PACKED = "F4"
"""The dtype of which the format counts single elements in the last dimension, and torch pairs of them, a byte each."""

HEADER_LENGTH_BYTES = 8
"""The header is preceded by its own length."""

HEADER_ALIGNMENT = 4096
"""Headers are padded so that the data starts on a page, which direct I/O and mapping want."""

METADATA = b'{"__metadata__":{"format":"pt","writer":"aiostage"}'
"""How every header begins that is written here. A directory with such a file and without a manifest is a damaged
checkpoint, and not one of another program: see ``_is_ours`` in checkpoint/foreign.py."""

MAX_HEADER_BYTES = 100_000_000
"""What the reference implementation accepts."""

MAX_TENSOR_NAME = 512
"""Longest name written, in characters. Keeps a header in proportion to the tree."""

_MAX_RECORD = 65_536
"""Longest description of one tensor that is read, in characters; 1,024 dimensions take a third of it."""

_WHITESPACE = " \t\n\r"

_RECORD_OVERHEAD = 96
"""Bytes of one record beyond its name and shape, at most: punctuation, keys, dtype and two 20-digit offsets."""


class TensorRecord(NamedTuple):
    """One tensor of a file. Made as fast as can be, for there may be many.

    Attributes:
        name: Unique in the checkpoint.
        dtype: The format's name of the dtype, a key of :data:`DTYPES`.
        shape: Sizes of the dimensions, as torch counts them.
        start: First byte, counted from the start of the data.
        stop: One past the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_cost(name: str, shape: Sequence[int]) -> int:
    """Return an upper bound of the bytes that a record takes in a header."""
    # JSON escapes a control character with six bytes. A size has up to 20 digits and a comma.
    return len(name.encode()) * 6 + 21 * len(shape) + _RECORD_OVERHEAD


def write_header(records: Iterable[TensorRecord]) -> bytearray:
    """Compose everything that comes before a file's data.

    Args:
        records: In the order of their data, without gaps.

    Returns:
        The length, the JSON and padding; a multiple of :data:`HEADER_ALIGNMENT` long.
    """
    header = bytearray(HEADER_LENGTH_BYTES)
    header += METADATA
    for record in releasing_gil(records):
        # By hand, which is faster than the json module.
        name = encode_basestring(record.name)
        sizes = record.shape if record.dtype != _PACKED else (*record.shape[:-1], 2 * record.shape[-1])
        shape = ",".join(map(str, sizes))
        header += (
            f',{name}:{{"dtype":"{record.dtype}","shape":[{shape}],"data_offsets":[{record.start},{record.stop}]}}'
        ).encode()
    header += b"}"
    header += b" " * (-len(header) % HEADER_ALIGNMENT)
    header[:HEADER_LENGTH_BYTES] = (len(header) - HEADER_LENGTH_BYTES).to_bytes(HEADER_LENGTH_BYTES, "little")
    return header


def read_header(header: bytes, data_bytes: int, *, path: str) -> list[TensorRecord]:
    """Read a header that may be damaged or hostile.

    The top-level object is taken apart by hand, one record at a time, so that neither a header of many megabytes
    nor one of deep nesting is handed to the JSON parser as a whole.

    Args:
        header: The JSON, without the length before it.
        data_bytes: How many bytes of data the file has behind it.
        path: The path of the file, for errors.

    Returns:
        The records in the order of their data, which they cover without gaps or overlaps.

    Raises:
        CheckpointCorruptError: If it is anything but a valid header for that much data.
    """
    records: dict[str, TensorRecord] = {}
    for record in releasing_gil(_records(header, path)):
        if records.setdefault(record.name, record) is not record:
            raise CheckpointCorruptError(f"its header names the tensor {shown(record.name)} twice.", path=path)
    # Without gaps and overlaps, as the format demands: nothing can be hidden between tensors, no byte counts twice, and
    # the tensors of a file take no more memory than the file has bytes.
    ordered = sorted(records.values(), key=attrgetter("start", "stop"))
    position = 0
    for record in ordered:
        if record.start != position:
            raise CheckpointCorruptError(
                f"its header puts the tensor {shown(record.name)} at byte {record.start} of the data, not at "
                f"{position}.",
                path=path,
            )
        position = record.stop
    if position != data_bytes:
        raise CheckpointCorruptError(f"its header describes {position} bytes of data, not {data_bytes}.", path=path)
    return ordered


_METADATA_NAME = "__metadata__"

_PLAIN = re.compile(
    r'"([^"\\\x00-\x1f]*)":\{"dtype":"([0-9A-Z_]+)","shape":\[([0-9,]{0,64})\],'
    r'"data_offsets":\[(0|[1-9][0-9]{0,17}),(0|[1-9][0-9]{0,17})\]\}(?:,(?=")|\Z)'
)
"""A member as nearly all writers spell it, with the comma before the next. The json module takes four times as long."""


def _records(header: bytes, path: str) -> Iterator[TensorRecord]:
    """Iterate over the tensors that the members of the top-level object describe, and check each."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_members)
    # By dtype and shape as they are spelled, the checked shape and its size in bytes. Most tensors have both in common
    # with others, and only the first of them is checked.
    kinds: dict[tuple[str, str], tuple[tuple[int, ...], int]] = {}
    try:
        text = header.decode().rstrip(_WHITESPACE)
        last = len(text) - 1
        if last < 1 or text[0] != "{" or text[last] != "}":
            raise ValueError("it is not a JSON object")
        position = _skip(text, 1)
        while position < last:
            if plain := _PLAIN.match(text, position, last):
                name, dtype, sizes, first, end = plain.groups()
                start, stop = int(first), int(end)
                shape, nbytes = kinds.get((dtype, sizes), ((), -1))
                if stop - start == nbytes and name != _METADATA_NAME:
                    yield TensorRecord(name, dtype, shape, start, stop)
                    position = plain.end()
                    continue
            name, position = decoder.raw_decode(text, position)
            position = _skip(text, position)
            if not isinstance(name, str) or text[position] != ":":
                raise ValueError(f"a name and a colon are expected before character {position}")
            position = _skip(text, position + 1)
            if name != _METADATA_NAME:
                # A record has no braces inside, so its end is found before it is parsed, and the parser never sees more
                # than _MAX_RECORD characters.
                closing = text.find("}", position, position + _MAX_RECORD)
                if closing < 0 or text.find("{", position + 1, closing) >= 0:
                    raise ValueError(
                        f"the record of {shown(name)} does not describe a tensor, or has over {_MAX_RECORD} characters"
                    )
            value, position = decoder.raw_decode(text, position)
            if name != _METADATA_NAME:
                record = _record(name, value, path)
                if plain:
                    kinds[dtype, sizes] = record.shape, record.stop - record.start
                yield record
            position = _skip(text, position)
            if position != last:
                if text[position] != ",":
                    raise ValueError(f"a comma is expected at character {position}")
                position = _skip(text, position + 1)
                if position == last:
                    raise ValueError(f"a name is expected at character {position}")
    except CheckpointCorruptError:
        raise
    except (ValueError, RecursionError, IndexError) as error:
        raise CheckpointCorruptError(f"its header cannot be read: {said(error)}.", path=path) from error


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, for a decoder's ``object_pairs_hook``.

    Raises:
        ValueError: If it names a member twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names one of its members twice")
    return found


def _skip(text: str, position: int) -> int:
    """Return where the next character is that is not white space."""
    while text[position] in _WHITESPACE:
        position += 1
    return position


def _record(name: str, value: Any, path: str) -> TensorRecord:
    """Check one member of the header."""
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        if len(value) != len(("dtype", "shape", "data_offsets")):
            raise ValueError("it has unknown members")
        shape, (start, stop) = checked_sizes(shape), checked_sizes([start, stop])
        if dtype == _PACKED:
            if not shape or shape[-1] % 2:
                raise ValueError("its last dimension has no pairs of elements")
            shape = (*shape[:-1], shape[-1] // 2)
        nbytes = DTYPES[dtype].itemsize * elements_in(shape)
        if stop - start != nbytes:
            raise ValueError(f"its {stop - start} bytes do not fit its shape and dtype")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointCorruptError(f"its header is wrong about {shown(name)}: {said(error)}.", path=path) from error
    return TensorRecord(name, dtype, shape, start, stop)


MAX_RANK = 1024
"""Dimensions of a tensor. PyTorch computes with 64 at the most."""

_MAX_SIZE = 1 << 62


def checked_sizes(values: Any) -> tuple[int, ...]:
    """Return sizes, strides or offsets of a tensor as a file spells them.

    Raises:
        ValueError: If they are not a list of whole numbers from 0, or are too many or too large.
    """
    if type(values) not in (list, tuple) or len(values) > MAX_RANK:
        raise ValueError(f"{shown(values)} are no sizes")
    # A loop, since this is called several times for each tensor, and all() with a generator takes longer.
    for value in values:
        if type(value) is not int or not 0 <= value < _MAX_SIZE:
            raise ValueError(f"{shown(values)} are no sizes")
    return tuple(values)


def elements_in(shape: Iterable[int]) -> int:
    """Return how many elements a shape has.

    Raises:
        ValueError: If they are more than any memory holds.
    """
    count = 1
    for size in shape:
        # A size of 0 may come last, after a product that is too large.
        count = min(count * size, _MAX_SIZE)
    if count == _MAX_SIZE:
        raise ValueError("a shape has more elements than any memory holds")
    return count


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides that PyTorch gives a new tensor."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def is_injective(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether it is certain that no two elements are at the same address."""
    # A condition that is enough, though not necessary: each stride exceeds the reach of all smaller ones.
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True
