"""The manifest: one JSON document of short lines, so that it is written and read a line at a time.

Its lines are, in this order: what it is, one line for each file, one for each node of the tree, and the digest of
everything before it. In the manifest of an incremental checkpoint, version 2, lines that say where the bytes of each
file lie come first. To a JSON parser it is an ordinary object; nothing in it is nested deeper than a few levels,
however deep the tree is.

The format outlives the process: a later aiostage must read what this one writes. The digest finds damage and not
attacks, so everything else is checked too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import xxhash

from aiostage._loop.workers import releasing_gil
from aiostage.abc import Buffer
from aiostage.errors import CheckpointCorruptError, CheckpointError, said, shown
from aiostage.format.lines import lines_of, parse_line
from aiostage.format.parts import DIGEST_NAME, MAX_PART_BYTES, PART_ALIGNMENT, parts_in
from aiostage.format.placement import BLOCK_BYTES, BLOCK_DIGEST_NAME, Extent, PlacedFile, Placement, SourceFile

__all__ = [
    "FORMAT_VERSION",
    "MAX_MANIFEST_BYTES",
    "MAX_NODES_BYTES",
    "PLACED_VERSION",
    "FileRecord",
    "Manifest",
    "is_dcp_manifest",
    "read_head",
    "read_manifest",
    "read_placement",
    "too_large",
    "with_placement",
    "write_manifest",
]

FORMAT = "aiostage"
_DCP = b'{"format": "aiostage-dcp"'
"""How the manifests of the other kind of checkpoint begin."""

FORMAT_VERSION = 1
PLACED_VERSION = 2
"""The version of incremental checkpoints. All others have version 1, so that an older aiostage can read them."""

MAX_MANIFEST_BYTES = 256 << 20
"""Larger ones are neither written nor read, so that a hostile one costs a bounded amount of memory. About three
million tensors fit."""

MAX_NODES_BYTES = MAX_MANIFEST_BYTES - (32 << 20)
"""How much of that the tree may take, so that a tree which is accepted has room for the digests of its files."""

MAX_NODES = 3_000_000
"""More are neither written nor read."""

_NODES_WITHOUT_FILES = 1_000_000
"""Nodes that any manifest may have."""

_BYTES_A_NODE = 64
"""A manifest may have one node more for so many bytes of files: what a tensor takes at least, its name included."""

_MAX_NUMBER = (1 << 63) - 1
"""Sizes and offsets of files are signed 64-bit integers in every system."""

_MAX_FILE_NAME = 255
"""The longest name that common file systems allow, in characters."""

# How lines begin and sections are separated, exactly as they are written. A reader compares bytes and parses only the
# lines between.
_MORE = '{"is":"more"'
_PLACES = b'"places":['
_FILES = b'"files":['
_FILES_AFTER_PLACES = b"]," + _FILES
_NODES = b'],"nodes":['
_MAX_ABOUT_BYTES = 1 << 20
_DIGEST_BYTES = 16
# Of fixed length, so that the reader finds it without parsing.
_END = b'],"digest":"%s"}\n'
_END_BYTES = len(_END) - 2 + _DIGEST_BYTES

_STEP_NAME = re.compile(r"step-[0-9]{8,20}")
"""What checkpoints are called that others may refer to."""

_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known of a file that was written.

    Attributes:
        name: In the checkpoint.
        nbytes: How long it is.
        digests: The digests of its parts, in order, in hexadecimal.
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
        placement: Where they lie; None if each lies as a whole in the checkpoint.
    """

    nbytes: int
    leaves: int
    part_bytes: int
    files: tuple[FileRecord, ...]
    placement: Placement | None


def is_dcp_manifest(text: Buffer) -> bool:
    """Return whether a manifest is of a checkpoint of :mod:`aiostage.dcp`, which is another format."""
    return bytes(text[: len(_DCP)]) == _DCP


def write_manifest(
    *, nbytes: int, leaves: int, part_bytes: int, files: Iterable[FileRecord], nodes: Iterable[str]
) -> bytearray:
    """Compose a manifest.

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
    files = tuple(files)
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
    _extend(text, lines, math.inf)
    text += _NODES + b"\n"
    _extend(text, nodes, _most_nodes(files))
    text += _END % xxhash.xxh3_64_hexdigest(text).encode()
    return text


def _most_nodes(files: Iterable[FileRecord]) -> int:
    """Return how many nodes there may be beside files. A node takes more memory than its line."""
    return min(MAX_NODES, _NODES_WITHOUT_FILES + sum(file.nbytes for file in files) // _BYTES_A_NODE)


def _extend(text: bytearray, lines: Iterable[str], left: float) -> None:
    """Append lines with commas between them, unless there are more nodes than a reader takes."""
    separator = b""
    for line in releasing_gil(lines):
        left -= not line.startswith(_MORE)
        if left < 0:
            raise CheckpointError(
                f"the values other than tensors have more than {_NODES_WITHOUT_FILES:,} objects, or all of it of more "
                f"than {MAX_NODES:,}.",
                remedy="Put bulk data into tensors.",
            )
        text += separator
        text += line.encode("ascii")
        separator = b",\n"
        if len(text) > MAX_MANIFEST_BYTES - _END_BYTES - len(_NODES):
            raise too_large()
    text += b"\n"


def too_large() -> CheckpointError:
    """Return the error for a tree that does not fit a manifest."""
    return CheckpointError(
        f"values other than tensors take more than {MAX_MANIFEST_BYTES >> 20} MiB in the manifest.",
        remedy="Put bulk data into tensors.",
    )


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def read_manifest(text: Buffer, *, path: str, add_node: Callable[[Any], object]) -> Manifest:
    """Read a manifest that may be damaged or hostile, in a worker thread.

    Args:
        text: The whole file.
        path: The path of the file, for errors.
        add_node: Called with the JSON value of each node, in order, which it has to check: it raises
            a ValueError, say, for what is not a node.

    Returns:
        What it says.

    Raises:
        CheckpointCorruptError: If it is anything but a manifest of a version that can be read.
    """
    with _damage(path):
        return _read(text, path, add_node)


def with_placement(text: bytes, placement: Placement) -> bytearray:
    """Add to a manifest where the files lie. Blocks.

    Args:
        text: What :func:`write_manifest` has made.
        placement: The placement of all files that it names.

    Returns:
        The whole file.
    """
    # The first such text is the section of files: only fixed keys and numbers come before it. What comes after it, the
    # tree, is large and is not parsed.
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


def read_placement(text: Buffer, *, path: str) -> Placement | None:
    """Read where the files of a checkpoint lie, as :func:`read_manifest` reads the manifest.

    Args:
        text: The whole file.
        path: The path of the file, for errors.

    Returns:
        Where they lie; None if each lies as a whole in the checkpoint.

    Raises:
        CheckpointCorruptError: If it is anything but a manifest of a version that can be read.
    """
    with _damage(path):
        lines, about = _opened(text, path)
        return _places(lines, about) if about["version"] == PLACED_VERSION else None


def read_head(text: Buffer, *, path: str) -> Manifest:
    """Read what a manifest says of the files, and nothing of the tree, as :func:`read_manifest` reads it.

    Args:
        text: The whole file, which may be damaged or hostile.
        path: The path of the file, for errors.

    Raises:
        CheckpointCorruptError: If it is anything but a manifest of a version that can be read.
    """
    with _damage(path):
        return _read_head(*_opened(text, path))


@contextmanager
def _damage(path: str) -> Iterator[None]:
    """Turn an error of reading into one that says that the manifest is damaged."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, CheckpointCorruptError):
            raise
        raise CheckpointCorruptError(f"it is not a manifest of aiostage: {said(error)}.", path=path) from error


def _opened(text: Buffer, path: str) -> tuple[Iterator[bytes], dict[str, Any]]:
    """Check whether a text is whole and can be read; return its lines after the first, and what that says."""
    if len(text) > MAX_MANIFEST_BYTES:
        raise CheckpointCorruptError(f"it is {len(text)} bytes long, too long for a manifest.", path=path)
    lines = lines_of(text)
    first = next(lines, b"")
    # In this order, so that each error names the true cause: another format first, a version that is not known before
    # the digest, which a later version may compute in another way.
    if is_dcp_manifest(text):
        raise CheckpointCorruptError(
            "it is of a checkpoint of aiostage.dcp.",
            path=path,
            remedy="Read it by aiostage.dcp.load() with a StorageReader.",
        )
    if len(first) > _MAX_ABOUT_BYTES:
        raise ValueError(f"its first line is {len(first)} bytes long")
    about: dict[str, Any] = parse_line(first.removesuffix(b",") + b"}")
    if about["format"] != FORMAT:
        raise ValueError(f"its format is {shown(about['format'])}")
    version = about["version"]
    if type(version) is not int or version not in (FORMAT_VERSION, PLACED_VERSION):
        raise CheckpointCorruptError(
            f"it is of format version {shown(version)}, and only {FORMAT_VERSION} and {PLACED_VERSION} are known.",
            path=path,
            remedy="Read it with a newer aiostage.",
        )
    # xxhash computes without the GIL.
    if text[-_END_BYTES:] != _END % xxhash.xxh3_64_hexdigest(text[:-_END_BYTES]).encode():
        raise CheckpointCorruptError("it does not match its own checksum.", path=path)
    return lines, about


def _read(text: Buffer, path: str, add_node: Callable[[Any], object]) -> Manifest:
    lines, about = _opened(text, path)
    manifest = _read_head(lines, about)
    most = left = _most_nodes(manifest.files)
    more = _MORE.encode()
    for line in releasing_gil(lines):
        if line[:2] == _END[:2]:
            break
        left -= line[: len(more)] != more
        if left < 0:
            raise ValueError(f"it has more than {most} nodes")
        node = _value(line)
        try:
            add_node(node)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            reason = f"its nodes do not describe a tree: {said(error)}."
            raise CheckpointCorruptError(reason, path=path) from error
    return manifest


def _read_head(lines: Iterator[bytes], about: dict[str, Any]) -> Manifest:
    """Read everything up to the nodes."""
    if about["digest_of_parts"] != DIGEST_NAME:
        raise ValueError(f"its digests are {shown(about['digest_of_parts'])}")
    part_bytes = _whole_number(about["part_bytes"])
    if not 0 < part_bytes <= MAX_PART_BYTES or part_bytes % PART_ALIGNMENT:
        raise ValueError(f"its files have parts of {part_bytes} bytes")
    placement = _places(lines, about) if about["version"] == PLACED_VERSION else None
    if placement is None and next(lines, None) != _FILES:
        raise ValueError("it does not list its files")
    files: dict[str, FileRecord] = {}
    for line in releasing_gil(lines):
        if line == _NODES:
            break
        file = _file(_value(line), part_bytes)
        if files.setdefault(file.name, file) is not file:
            raise ValueError(f"it lists the file {shown(file.name)} twice")
    return Manifest(
        _whole_number(about["nbytes"]), _whole_number(about["leaves"]), part_bytes, tuple(files.values()), placement
    )


def _places(lines: Iterator[bytes], about: dict[str, Any]) -> Placement:
    """Read where files lie, up to the line that begins the list of files."""
    if about["digest_of_blocks"] != BLOCK_DIGEST_NAME or about["block_bytes"] != BLOCK_BYTES:
        raise ValueError(f"its blocks are {shown(about['block_bytes'])} bytes with {shown(about['digest_of_blocks'])}")
    sizes: dict[SourceFile, int] = {}
    for source, file, nbytes in about["sources"]:
        sizes[None if source is None else _source(source), _name(file)] = _whole_number(nbytes)
    if next(lines, None) != _PLACES:
        raise ValueError("it does not say where its files lie")
    places = list(sizes)
    files: dict[str, PlacedFile] = {}
    for line in releasing_gil(lines):
        if line == _FILES_AFTER_PLACES:
            return Placement(sizes, files)
        value = _value(line)
        files[_name(value["name"])] = _placed(value, places)
    raise ValueError("it does not list its files")


def _value(line: bytes) -> Any:
    """Return what a line says, which may end with a comma."""
    return parse_line(line.removesuffix(b","))


def _file(value: Any, part_bytes: int) -> FileRecord:
    """Check one file."""
    name, nbytes, digests = _name(value["name"]), _whole_number(value["nbytes"]), value["digests"]
    if len(digests) != parts_in(nbytes, part_bytes) or not all(isinstance(text, str) for text in digests):
        raise ValueError(f"the file {shown(name)} has {len(digests)} digests for {nbytes} bytes")
    return FileRecord(name, nbytes, tuple(digests))


def _placed(value: Any, places: Sequence[SourceFile]) -> PlacedFile:
    """Check where one file lies."""
    pieces: list[Extent] = []
    for number, offset, nbytes in releasing_gil(value["pieces"]):
        pieces.append(Extent(*places[_whole_number(number)], _whole_number(offset), _whole_number(nbytes)))
    blocks = value["blocks"]
    placed = PlacedFile.of(blocks, pieces)
    if len(blocks) != -(-placed.nbytes // BLOCK_BYTES) or not all(isinstance(text, str) for text in blocks):
        raise ValueError(f"the file {shown(value['name'])} has {len(blocks)} blocks for {placed.nbytes} bytes")
    return placed


def _name(value: Any) -> str:
    """Check the name of a file, which must not lead out of its checkpoint."""
    # No "/", so that there is no "../"; no "." at the beginning, where "..", ".metadata" and temporary files are.
    if (
        not isinstance(value, str)
        or not 0 < len(value) <= _MAX_FILE_NAME
        or value[0] == "."
        or not _NAME_CHARACTERS.issuperset(value)
    ):
        raise ValueError(f"{shown(value)} is not a name of a file")
    return value


def _source(value: Any) -> str:
    """Check the name of a checkpoint that others refer to: a step of the same run, and no path to anything else."""
    if not isinstance(value, str) or not _STEP_NAME.fullmatch(value):
        raise ValueError(f"{shown(value)} is not a name of a step's checkpoint")
    return value


def _whole_number(value: Any) -> int:
    # Not isinstance(): true is an int in Python, and no size.
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        raise ValueError(f"{shown(value)} is not an integer from 0 to {_MAX_NUMBER}")
    return value
