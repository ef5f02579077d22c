"""JSON a line at a time: a text is split into lines, and each is parsed with suspicion.

A manifest of 256 MiB as one value would hold the GIL for seconds, and a hostile one could ask for a hundred times its
size in Python objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from aiostage.abc import Buffer
from aiostage.format.safetensors import unique_members

__all__ = ["lines_of", "parse_line"]

_WINDOW_BYTES = 64 << 10
"""How much is split at once, which holds the GIL. A text as a whole would be copied, and be a list of all its lines."""

_SHORT_BYTES = 64 << 10
"""Lines up to this length are parsed without a count of their values."""

_BYTES_A_VALUE = 12
"""Longer lines must have at least so many bytes for each value, since a value of two characters becomes an object of 28
bytes and more. Long lines that are written have digests in them, of 16 characters and more, or a few long texts."""

_BYTES_A_TEXT = 256
"""Lines with at least so many bytes for each of their texts may have any characters in these."""

_TENSOR = re.compile(rb'\{"is":"tensor","name":"([^"\\\x00-\x1f]*)"\}')
"""What most lines of most trees are. The json module takes three times as long for it."""

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_DELIMITERS = (b",", b":", b"[", b"{")


def lines_of(text: Buffer) -> Iterator[bytes]:
    """Iterate over the lines of a text that are not empty, without their ends.

    Args:
        text: Contiguous bytes. They are not copied as a whole.
    """
    begun: list[bytes] = []
    for start in range(0, len(text), _WINDOW_BYTES):
        first, *others = bytes(text[start : start + _WINDOW_BYTES]).split(b"\n")
        begun.append(first)
        for other in others:
            line = b"".join(begun)
            # Blank lines only occur where a list is empty.
            if line:
                yield line
            begun = [other]
    if line := b"".join(begun):
        yield line


def parse_line(line: bytes) -> Any:
    """Return the value that a line of JSON describes.

    Raises:
        ValueError: If it is not JSON, names a member twice, has a number that is none, or consists of too many values.
        RecursionError: If it is nested too deeply.
    """
    most = len(line) // _BYTES_A_VALUE
    # Counting delimiters is an upper bound, and takes no memory. Delimiters inside of texts count too, so a line that
    # has too many is counted again without its texts, if these are few: else replacing them would take too long.
    if len(line) > _SHORT_BYTES and _values(line) > most:
        texts = (line.count(b'"') - line.count(b'\\"')) // 2
        if texts > len(line) // _BYTES_A_TEXT or _values(_STRING.sub(b'""', line)) > _SHORT_BYTES // _BYTES_A_VALUE:
            raise ValueError(f"a line of {len(line)} bytes consists of more than {most} values")
    if plain := _TENSOR.fullmatch(line):
        return {"is": "tensor", "name": plain[1].decode()}
    return _decode(line.decode())


def _values(line: bytes) -> int:
    return sum(map(line.count, _DELIMITERS))


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


# json.loads would make a decoder for each line.
_decode = json.JSONDecoder(object_pairs_hook=unique_members, parse_constant=_no_number).decode
