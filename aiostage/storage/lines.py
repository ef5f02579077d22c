"""Reading JSON that is a text of lines: one ``json.loads`` for each, of which none can take more than it should.

A line of a hostile text may be as long as the text, and a Python object takes up to twenty times as many bytes as its
JSON. So what a long line may consist of is counted before it is parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from aiostage.abc import Buffer

__all__ = ["lines_of", "parse_line"]

_WINDOW_BYTES = 64 << 10
"""How much is split at once."""

_SHORT_BYTES = 64 << 10
"""Lines up to this length are parsed whatever they consist of."""

_BYTES_A_VALUE = 12
"""Longer lines consist of at least as many bytes for each value. Those that are written have digests in them, of 16
characters and more, or a few values of any length."""

_BYTES_A_TEXT = 256

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_MARKS = (b",", b":", b"[", b"{")


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
        ValueError: If it is no JSON, names a member twice, has a number that is none, or consists of too many values.
        RecursionError: If it is nested too deeply.
    """
    most = len(line) // _BYTES_A_VALUE
    if len(line) > _SHORT_BYTES and _values(line) > most:
        # Most of it may be a few texts with such characters in them.
        texts = (line.count(b'"') - line.count(b'\\"')) // 2
        if texts > len(line) // _BYTES_A_TEXT or _values(_STRING.sub(b'""', line)) > _SHORT_BYTES // _BYTES_A_VALUE:
            raise ValueError(f"a line of {len(line)} bytes consists of more than {most} values")
    return _decode(line.decode())


def _values(line: bytes) -> int:
    return sum(map(line.count, _MARKS))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names one of its members twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


# json.loads would make a decoder for each line.
_decode = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number).decode
