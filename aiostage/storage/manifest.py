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
from functools import partial
from typing import Any

import xxhash

from aiostage._loop.slices import Slices, exhausted
from aiostage._loop.workers import Workers
from aiostage.abc import Buffer
from aiostage.errors import CheckpointCorruptError, CheckpointError
from aiostage.storage.files import DIRECT_ALIGNMENT
from aiostage.storage.lines import Lines, parse
from aiostage.storage.parts import DIGEST_NAME, MAX_PART_BYTES, parts_in
from aiostage.storage.placement import BLOCK_BYTES, BLOCK_DIGEST_NAME, Piece, Place, PlacedFile, Placement

__all__ = [
    "FORMAT_VERSION",
    "MAX_MANIFEST_BYTES",
    "MAX_NODES_BYTES",
    "PLACED_VERSION",
    "FileRecord",
    "Manifest",
    "read_manifest",
    "read_placement",
    "read_summary",
    "too_large",
    "with_placement",
    "write_manifest",
]

FORMAT = "aiostage"
_DCP = b'{"format": "aiostage-dcp"'
"""How the manifests of the other kind of checkpoint begin."""

FORMAT_VERSION = 1
PLACED_VERSION = 2
"""Of checkpoints whose files lie in pieces. Others stay readable for those who know version 1 only."""

MAX_MANIFEST_BYTES = 256 << 20
"""Larger ones are neither written nor read, so that a hostile one costs a bounded amount of memory. About three
million tensors fit."""

MAX_NODES_BYTES = MAX_MANIFEST_BYTES - (32 << 20)
"""How much of that the tree may take, so that a tree which is accepted has room for the digests of its files."""

_CHUNK = 64
_PLACES = b'"places":['
_FILES = b'"files":['
_FILES_AFTER_PLACES = b"]," + _FILES
_NODES = b'],"nodes":['
_MAX_ABOUT_BYTES = 1 << 20
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
            raise too_large()
        if number % _CHUNK == 0:
            yield
    text += b"\n"


def too_large() -> CheckpointError:
    """Return the error for a tree that does not fit a manifest."""
    return CheckpointError(
        f"what is not a tensor takes more than {MAX_MANIFEST_BYTES >> 20} MiB in the manifest.",
        remedy="Put bulk data into tensors.",
    )


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


async def read_manifest(text: Buffer, *, path: str, workers: Workers, slices: Slices) -> Manifest:
    """Read a manifest that may be damaged or hostile.

    Args:
        text: The whole file, at most :data:`MAX_MANIFEST_BYTES` long.
        path: Of the file, for errors.
        workers: To compute its checksum in.
        slices: Run everything else.

    Returns:
        What it says. The nodes are JSON values, unchecked.

    Raises:
        CheckpointCorruptError: If it is anything but a manifest of a version that can be read.
    """
    with _damage(path):
        lines, about = await _opened(text, path, workers, slices)
        return await slices.run(_read(lines, about))


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


async def read_placement(text: Buffer, *, path: str, workers: Workers, slices: Slices) -> Placement | None:
    """Read where the files of a checkpoint lie, from a manifest that may be damaged or hostile.

    Args:
        text: The whole file, at most :data:`MAX_MANIFEST_BYTES` long.
        path: Of the file, for errors.
        workers: To compute its checksum in.
        slices: Run everything else.

    Returns:
        Where they lie; None if each lies as a whole in the checkpoint.

    Raises:
        CheckpointCorruptError: If it is anything but a manifest of a version that can be read.
    """
    with _damage(path):
        lines, about = await _opened(text, path, workers, slices)
        if about["version"] != PLACED_VERSION:
            return None
        return await slices.run(_read_placement(lines, about))


def read_summary(text: bytes, *, path: str) -> tuple[int, int]:
    """Read how many bytes of tensors a checkpoint has, and how many leaves. Blocks.

    Args:
        text: The whole manifest, which may be damaged or hostile.
        path: Of the file, for errors.

    Raises:
        CheckpointCorruptError: If it is anything but a manifest of a version that can be read.
    """
    with _damage(path):
        about = exhausted(_about(Lines(memoryview(text)), path))
        _check_digest(memoryview(text), path)
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


async def _opened(text: Buffer, path: str, workers: Workers, slices: Slices) -> tuple[Lines, dict[str, Any]]:
    """Read the first line, and check whether the rest can be read and is whole."""
    lines = Lines(text)
    about = await slices.run(_about(lines, path))
    await workers.run(partial(_check_digest, text, path))
    return lines, about


def _about(lines: Lines, path: str) -> Generator[None, None, dict[str, Any]]:
    """Read the first line."""
    line = yield from lines.next()
    if bytes(line[: len(_DCP)]) == _DCP:
        raise CheckpointCorruptError(
            "it is of a checkpoint of aiostage.dcp.",
            path=path,
            remedy="Read it by aiostage.dcp.load() with a StorageReader.",
        )
    if len(line) > _MAX_ABOUT_BYTES:
        raise ValueError(f"its first line is {len(line)} bytes long")
    about: dict[str, Any] = yield from parse(bytes(line).removesuffix(b",") + b"}")
    if about["format"] != FORMAT:
        raise ValueError(f"its format is {about['format']!r}")
    if about["version"] not in (FORMAT_VERSION, PLACED_VERSION):
        raise CheckpointCorruptError(
            f"it is of format version {about['version']!r}, and only {FORMAT_VERSION} and {PLACED_VERSION} are known.",
            path=path,
            remedy="Read it with a newer aiostage.",
        )
    return about


def _check_digest(text: Buffer, path: str) -> None:
    """Raise an error if a manifest does not match its checksum. Blocks, without the GIL."""
    if text[-_END_BYTES:] != _END % xxhash.xxh3_64_hexdigest(text[:-_END_BYTES]).encode():
        raise CheckpointCorruptError("it does not match its own checksum.", path=path)


def _read(lines: Lines, about: dict[str, Any]) -> Generator[None, None, Manifest]:
    if about["digest_of_parts"] != DIGEST_NAME:
        raise ValueError(f"its digests are {about['digest_of_parts']!r}")
    part_bytes = _whole_number(about["part_bytes"])
    if not 0 < part_bytes <= MAX_PART_BYTES or part_bytes % DIRECT_ALIGNMENT:
        raise ValueError(f"its files have parts of {part_bytes} bytes")
    line = yield from lines.next()
    if about["version"] == PLACED_VERSION:
        while line not in (_FILES_AFTER_PLACES, b""):
            line = yield from lines.next()
            yield
    elif line != _FILES:
        raise ValueError("it does not list its files")
    files: list[FileRecord] = []
    nodes: list[Any] = []
    while (line := (yield from lines.next())) not in (_NODES, b""):
        value = yield from _value(line)
        files.append(_file(value, part_bytes))
        yield
    while bytes((line := (yield from lines.next()))[:2]) not in (_END[:2], b""):
        nodes.append((yield from _value(line)))
        if len(nodes) % _CHUNK == 0:
            yield
    return Manifest(_whole_number(about["nbytes"]), _whole_number(about["leaves"]), part_bytes, tuple(files), nodes)


def _read_placement(lines: Lines, about: dict[str, Any]) -> Generator[None, None, Placement]:
    if about["digest_of_blocks"] != BLOCK_DIGEST_NAME or about["block_bytes"] != BLOCK_BYTES:
        raise ValueError(f"its blocks are {about['block_bytes']!r} bytes with {about['digest_of_blocks']!r}")
    sizes: dict[Place, int] = {}
    for source, file, nbytes in about["sources"]:
        sizes[None if source is None else _source(source), _name(file)] = _whole_number(nbytes)
        yield
    if (yield from lines.next()) != _PLACES:
        raise ValueError("it does not say where its files lie")
    places = list(sizes)
    files: dict[str, PlacedFile] = {}
    while (line := (yield from lines.next())) not in (_FILES_AFTER_PLACES, b""):
        value = yield from _value(line)
        files[_name(value["name"])] = yield from _placed(value, places)
        yield
    return Placement(sizes, files)


def _value(line: bytes | Buffer) -> Generator[None, None, Any]:
    """Return what a line says, which may end with a comma."""
    return (yield from parse(line[:-1] if line[-1:] == b"," else line))


def _file(value: Any, part_bytes: int) -> FileRecord:
    """Check one file. Its name must not lead out of the directory."""
    name, nbytes, digests = _name(value["name"]), _whole_number(value["nbytes"]), value["digests"]
    if len(digests) != parts_in(nbytes, part_bytes) or not all(isinstance(text, str) for text in digests):
        raise ValueError(f"the file {name!r} has {len(digests)} digests for {nbytes} bytes")
    return FileRecord(name, nbytes, tuple(digests))


def _placed(value: Any, places: Sequence[Place]) -> Generator[None, None, PlacedFile]:
    """Check where one file lies, yielding now and then."""
    pieces: list[Piece] = []
    for number, offset, nbytes in value["pieces"]:
        pieces.append(Piece(*places[_whole_number(number)], _whole_number(offset), _whole_number(nbytes)))
        if len(pieces) % _CHUNK == 0:
            yield
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
