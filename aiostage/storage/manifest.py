"""The manifest: one JSON document of short lines, so that it is written and read a line at a time.

Its lines are, in this order: what it is, one line for each file, one for each node of the tree, and the digest of
everything before it. To a JSON parser it is an ordinary object; nothing in it is nested deeper than a few levels,
however deep the tree is.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from aiostage.errors import CheckpointCorruptError, CheckpointError
from aiostage.storage.files import DIRECT_ALIGNMENT
from aiostage.storage.parts import DIGEST_NAME, MAX_PART_BYTES, parts_in

__all__ = ["FORMAT_VERSION", "MAX_MANIFEST_BYTES", "FileRecord", "Manifest", "read_manifest", "write_manifest"]

FORMAT = "aiostage"
FORMAT_VERSION = 1

MAX_MANIFEST_BYTES = 256 << 20
"""Larger ones are neither written nor read, so that a hostile one costs a bounded amount of memory. About three
million tensors fit."""

_CHUNK = 64
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
    try:
        manifest = yield from _read(text, path)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointCorruptError):
            raise
        raise CheckpointCorruptError(f"it is not a manifest of aiostage: {error!r}.", path=path) from error
    return manifest


def _read(text: bytes, path: str) -> Generator[None, None, Manifest]:
    lines = _lines(text)
    about = json.loads(next(lines, b"").removesuffix(b",") + b"}")
    if about["format"] != FORMAT:
        raise ValueError(f"its format is {about['format']!r}")
    if about["version"] != FORMAT_VERSION:
        raise CheckpointCorruptError(
            f"it is of format version {about['version']!r}, and only {FORMAT_VERSION} is known.",
            path=path,
            remedy="Read it with a newer aiostage.",
        )
    body = memoryview(text)[:-_END_BYTES]
    if text[-_END_BYTES:] != _END % xxhash.xxh3_64_hexdigest(body).encode():
        raise CheckpointCorruptError("it does not match its own checksum.", path=path)
    if about["digest_of_parts"] != DIGEST_NAME:
        raise ValueError(f"its digests are {about['digest_of_parts']!r}")
    part_bytes = _whole_number(about["part_bytes"])
    if not 0 < part_bytes <= MAX_PART_BYTES or part_bytes % DIRECT_ALIGNMENT:
        raise ValueError(f"its files have parts of {part_bytes} bytes")
    if next(lines, b"") != _FILES:
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
    name, nbytes, digests = value["name"], _whole_number(value["nbytes"]), value["digests"]
    if not isinstance(name, str) or not name or name[0] == "." or not _NAME_CHARACTERS.issuperset(name):
        raise ValueError(f"{name!r} is no name of a file")
    if len(digests) != parts_in(nbytes, part_bytes) or not all(isinstance(text, str) for text in digests):
        raise ValueError(f"the file {name!r} has {len(digests)} digests for {nbytes} bytes")
    return FileRecord(name, nbytes, tuple(digests))


def _whole_number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number from 0")
    return value
