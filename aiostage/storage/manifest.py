"""The manifest: one JSON document of short lines, so that it is written and read a line at a time.

Its lines are, in this order: what it is, one line for each file, one for each node of the tree, and the digest of
everything before it. In that of a checkpoint whose bytes lie in pieces, version 2, one line for each file comes before
them, which says where. To a JSON parser it is an ordinary object; nothing in it is nested deeper than a few levels,
however deep the tree is.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import xxhash

from aiostage.errors import CheckpointCorruptError, CheckpointError
from aiostage.storage.files import DIRECT_ALIGNMENT
from aiostage.storage.parts import DIGEST_NAME, MAX_PART_BYTES, parts_in
from aiostage.storage.placement import BLOCK_BYTES, BLOCK_DIGEST_NAME, Piece, Place, PlacedFile, Placement

__all__ = [
    "FORMAT_VERSION",
    "MAX_MANIFEST_BYTES",
    "PLACED_VERSION",
    "FileRecord",
    "Manifest",
    "read_manifest",
    "read_placement",
    "read_summary",
    "with_placement",
    "write_manifest",
]

FORMAT = "aiostage"
FORMAT_VERSION = 1
PLACED_VERSION = 2
"""Of checkpoints whose files lie in pieces. Others stay readable for those who know version 1 only."""

MAX_MANIFEST_BYTES = 256 << 20
"""Larger ones are neither written nor read, so that a hostile one costs a bounded amount of memory. About three
million tensors fit."""

_CHUNK = 64
_PLACES = b'"places":['
_FILES = b'"files":['
_NODES = b'],"nodes":['
_DIGEST_BYTES = 16
_END = b'],"digest":"%s"}\n'
_END_BYTES = len(_END) - 2 + _DIGEST_BYTES

_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known of a file that was written.

    Attributes:
        name: In the checkpoint.
        nbytes: How long it is.
        digests: Of its parts, in order, in hexadecimal.
    """

    name: str
    nbytes: int
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says.

    Attributes:
        nbytes: Size of the tensors, in bytes.
        leaves: How many tensors the tree has.
        part_bytes: How long the parts are that the files have digests of.
        files: Every other file of the checkpoint.
        nodes: The tree, one JSON value for each line.
    """

    nbytes: int
    leaves: int
    part_bytes: int
    files: tuple[FileRecord, ...]
    nodes: Sequence[Any]


def write_manifest(
    *, nbytes: int, leaves: int, part_bytes: int, files: Iterable[FileRecord], nodes: Iterable[str]
) -> Generator[None, None, bytearray]:
    """Compose a manifest, yielding now and then.

    Args:
        nbytes: Size of the tensors, in bytes.
        leaves: How many tensors the tree has.
        part_bytes: How long the parts are that the files have digests of.
        files: Every other file of the checkpoint.
        nodes: The tree, as JSON in ASCII without line breaks.

    Returns:
        The whole file.

    Raises:
        CheckpointError: If it became too large to be read again.
    """
    about = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "nbytes": nbytes,
        "leaves": leaves,
        "part_bytes": part_bytes,
        "digest_of_parts": DIGEST_NAME,
    }
    text = bytearray(_dump(about).encode()[:-1] + b",\n" + _FILES + b"\n")
    lines = (_dump({"name": file.name, "nbytes": file.nbytes, "digests": file.digests}) for file in files)
    yield from _extend(text, lines)
    text += _NODES + b"\n"
    yield from _extend(text, nodes)
    text += _END % xxhash.xxh3_64_hexdigest(text).encode()
    return text


def _extend(text: bytearray, lines: Iterable[str]) -> Generator[None, None, None]:
    """Append lines with commas between them."""
    separator = b""
    for number, line in enumerate(lines):
        text += separator
        text += line.encode("ascii")
        separator = b",\n"
        if len(text) > MAX_MANIFEST_BYTES - _END_BYTES - len(_NODES):
            raise CheckpointError(
                f"what is not a tensor takes more than {MAX_MANIFEST_BYTES >> 20} MiB in the manifest.",
                remedy="Put bulk data into tensors.",
            )
        if number % _CHUNK == 0:
            yield
    text += b"\n"


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def read_manifest(text: bytes, *, path: str) -> Generator[None, None, Manifest]:
    """Read a manifest that may be damaged or hostile, yielding now and then.

    Args:
        text: The whole file, at most :data:`MAX_MANIFEST_BYTES` long.
        path: Of the file, for errors.

    Returns:
        What it says. The nodes are JSON values, unchecked.

    Raises:
        CheckpointCorruptError: If it is anything but a manifest of a version that can be read.
    """
    with _damage(path):
        manifest = yield from _read(text, path)
    return manifest


def with_placement(text: bytes, placement: Placement) -> bytearray:
    """Add to a manifest where the files lie. Blocks.

    Args:
        text: What :func:`write_manifest` has made.
        placement: Of all files that it names.

    Returns:
        The whole file.
    """
    head, files = text[:-_END_BYTES].split(_FILES, 1)
    about = json.loads(head.rstrip(b",\n") + b"}")
    numbers = {place: number for number, place in enumerate(placement.sizes)}
    about["version"] = PLACED_VERSION
    about["digest_of_blocks"] = BLOCK_DIGEST_NAME
    about["block_bytes"] = BLOCK_BYTES
    about["sources"] = [[source, file, nbytes] for (source, file), nbytes in placement.sizes.items()]
    lines = [
        _dump(
            {
                "name": name,
                "blocks": list(file.blocks),
                "pieces": [[numbers[piece.place], piece.offset, piece.nbytes] for piece in file.pieces],
            }
        ).encode()
        for name, file in placement.files.items()
    ]
    placed = bytearray(_dump(about).encode()[:-1] + b",\n" + _PLACES + b"\n" + b",\n".join(lines) + b"\n],")
    placed += _FILES + files
    placed += _END % xxhash.xxh3_64_hexdigest(placed).encode()
    if len(placed) > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"its manifest takes more than {MAX_MANIFEST_BYTES >> 20} MiB.", remedy="Save without incremental=True."
        )
    return placed


def read_placement(text: bytes, *, path: str) -> Placement | None:
    """Read where the files of a checkpoint lie, from a manifest that may be damaged or hostile. Blocks.

    Args:
        text: The whole file.
        path: Of the file, for errors.

    Returns:
        Where they lie; None if each lies as a whole in the checkpoint.

    Raises:
        CheckpointCorruptError: If it is anything but a manifest of a version that can be read.
    """
    with _damage(path):
        lines = _lines(text)
        about = _about(lines, text, path)
        if about["version"] != PLACED_VERSION:
            return None
        if about["digest_of_blocks"] != BLOCK_DIGEST_NAME or about["block_bytes"] != BLOCK_BYTES:
            raise ValueError(f"its blocks are {about['block_bytes']!r} bytes with {about['digest_of_blocks']!r}")
        sizes: dict[Place, int] = {}
        for source, file, nbytes in about["sources"]:
            sizes[None if source is None else _source(source), _name(file)] = _whole_number(nbytes)
        if next(lines, b"") != _PLACES:
            raise ValueError("it does not say where its files lie")
        places = list(sizes)
        files: dict[str, PlacedFile] = {}
        for line in lines:
            if line == b"]," + _FILES:
                break
            value = json.loads(line.removesuffix(b","))
            files[_name(value["name"])] = _placed(value, places)
        return Placement(sizes, files)


def read_summary(text: bytes, *, path: str) -> tuple[int, int]:
    """Read how many bytes of tensors a checkpoint has, and how many leaves. Blocks.

    Args:
        text: The whole manifest, which may be damaged or hostile.
        path: Of the file, for errors.

    Raises:
        CheckpointCorruptError: If it is anything but a manifest of a version that can be read.
    """
    with _damage(path):
        about = _about(_lines(text), text, path)
        return _whole_number(about["nbytes"]), _whole_number(about["leaves"])


@contextmanager
def _damage(path: str) -> Iterator[None]:
    """Say of whatever goes wrong in reading that the manifest is damaged."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        if isinstance(error, CheckpointCorruptError):
            raise
        raise CheckpointCorruptError(f"it is not a manifest of aiostage: {error!r}.", path=path) from error


def _about(lines: Iterator[bytes], text: bytes, path: str) -> dict[str, Any]:
    """Read the first line, and check whether the rest can be read and is whole."""
    about: dict[str, Any] = json.loads(next(lines, b"").removesuffix(b",") + b"}")
    if about["format"] != FORMAT:
        raise ValueError(f"its format is {about['format']!r}")
    if about["version"] not in (FORMAT_VERSION, PLACED_VERSION):
        raise CheckpointCorruptError(
            f"it is of format version {about['version']!r}, and only {FORMAT_VERSION} and {PLACED_VERSION} are known.",
            path=path,
            remedy="Read it with a newer aiostage.",
        )
    body = memoryview(text)[:-_END_BYTES]
    if text[-_END_BYTES:] != _END % xxhash.xxh3_64_hexdigest(body).encode():
        raise CheckpointCorruptError("it does not match its own checksum.", path=path)
    return about


def _read(text: bytes, path: str) -> Generator[None, None, Manifest]:
    lines = _lines(text)
    about = _about(lines, text, path)
    if about["digest_of_parts"] != DIGEST_NAME:
        raise ValueError(f"its digests are {about['digest_of_parts']!r}")
    part_bytes = _whole_number(about["part_bytes"])
    if not 0 < part_bytes <= MAX_PART_BYTES or part_bytes % DIRECT_ALIGNMENT:
        raise ValueError(f"its files have parts of {part_bytes} bytes")
    if about["version"] == PLACED_VERSION:
        for line in lines:
            if line == b"]," + _FILES:
                break
            yield
    elif next(lines, b"") != _FILES:
        raise ValueError("it does not list its files")
    files = []
    for line in lines:
        if line == _NODES:
            break
        files.append(_file(json.loads(line.removesuffix(b",")), part_bytes))
        yield
    nodes = []
    for line in lines:
        if line.startswith(_END[:2]):
            break
        nodes.append(json.loads(line.removesuffix(b",")))
        if len(nodes) % _CHUNK == 0:
            yield
    return Manifest(_whole_number(about["nbytes"]), _whole_number(about["leaves"]), part_bytes, tuple(files), nodes)


def _lines(text: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(text):
        stop = text.find(b"\n", start)
        if stop < 0:
            stop = len(text)
        # Blank lines only occur where a list is empty.
        if stop > start:
            yield text[start:stop]
        start = stop + 1


def _file(value: Any, part_bytes: int) -> FileRecord:
    """Check one file. Its name must not lead out of the directory."""
    name, nbytes, digests = _name(value["name"]), _whole_number(value["nbytes"]), value["digests"]
    if len(digests) != parts_in(nbytes, part_bytes) or not all(isinstance(text, str) for text in digests):
        raise ValueError(f"the file {name!r} has {len(digests)} digests for {nbytes} bytes")
    return FileRecord(name, nbytes, tuple(digests))


def _placed(value: Any, places: Sequence[Place]) -> PlacedFile:
    """Check where one file lies."""
    pieces = [
        Piece(*places[_whole_number(number)], _whole_number(offset), _whole_number(nbytes))
        for number, offset, nbytes in value["pieces"]
    ]
    blocks = value["blocks"]
    placed = PlacedFile.of(blocks, pieces)
    if len(blocks) != -(-placed.nbytes // BLOCK_BYTES) or not all(isinstance(text, str) for text in blocks):
        raise ValueError(f"the file {value['name']!r} has {len(blocks)} blocks for {placed.nbytes} bytes")
    return placed


def _name(value: Any) -> str:
    """Check the name of a file, which must not lead out of its checkpoint."""
    if not isinstance(value, str) or not value or value[0] == "." or not _NAME_CHARACTERS.issuperset(value):
        raise ValueError(f"{value!r} is no name of a file")
    return value


def _source(value: Any) -> str:
    """Check the name of a checkpoint, which must not lead out of its storage."""
    if not isinstance(value, str) or any(step in ("", ".", "..") for step in value.split("/")):
        raise ValueError(f"{value!r} is no name of a checkpoint")
    return value


def _whole_number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number from 0")
    return value
