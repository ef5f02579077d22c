"""Reading JSON that is a text of lines, most of them short, without ever parsing much at a time.

The parser of the standard library does not let go of the interpreter before it is done, in whichever thread it runs. A
short line goes to it as a whole, a long one in pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Any

from aiostage.abc import Buffer

__all__ = ["STEP_BYTES", "Lines", "parse"]

STEP_BYTES = 32 << 10
"""How much is looked at or parsed between two yields: about a third of a millisecond in which nothing else runs."""

_MAX_DEPTH = 32
"""Of lists and objects in long lines. A manifest has a few."""

_TOKENS = 64
"""Values between two yields."""

_SPACE = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb'"[^"\\]*"|[-+.\w]+')
_RUN = re.compile(
    rb"""(?: [ \t]*
             (?: "[^"\\]*" | [-+.\w]+ | \[ [^"\\\[\]{}]* (?: "[^"\\]*" [^"\\\[\]{}]* )* \] )
             [ \t]* ,
         )+""",
    re.VERBOSE,
)
"""Scalars and lists of scalars in a row, each with its comma."""

_TEXT = re.compile(
    rb'(?:[^"\\]+|(?P<high>\\u[dD][89abAB][0-9a-fA-F]{2})|\\u[0-9a-fA-F]{4}|\\[^u])*',
    re.DOTALL,
)
"""The inside of a string, up to where an escape is cut off."""


class Lines:
    """The lines of a text that are not empty, one after the other.

    Args:
        text: Contiguous bytes. They are not copied as a whole.
        step_bytes: How much to look at between two yields.
    """

    def __init__(self, text: Buffer, step_bytes: int = STEP_BYTES) -> None:
        self._text = text
        self._step_bytes = step_bytes
        # What is looked at: where it begins, a copy of it, and where in that the next line begins.
        self._start = self._at = 0
        self._window = bytes(text[:step_bytes])

    def next(self) -> Generator[None, None, bytes | Buffer]:
        """Return the next line without its end, yielding now and then; an empty one after the last.

        A long one is a part of the text and not a copy.
        """
        while True:
            stop = self._window.find(b"\n", self._at)
            if stop >= 0:
                line, self._at = self._window[self._at : stop], stop + 1
            elif self._start + len(self._window) >= len(self._text):
                line, self._at = self._window[self._at :], len(self._window)
                return line
            elif self._at:
                self._look_at(self._start + self._at)
                continue
            else:
                return (yield from self._long())
            # Blank lines only occur where a list is empty.
            if line:
                return line

    def _look_at(self, start: int) -> None:
        self._start, self._at = start, 0
        self._window = bytes(self._text[start : start + self._step_bytes])

    def _long(self) -> Generator[None, None, Buffer]:
        """Return a line that is longer than the window."""
        start = self._start
        while True:
            self._look_at(self._start + len(self._window))
            stop = self._window.find(b"\n")
            if stop >= 0:
                self._at = stop + 1
                return self._text[start : self._start + stop]
            if not self._window:
                return self._text[start:]
            yield


def parse(text: bytes | Buffer, step_bytes: int = STEP_BYTES) -> Generator[None, None, Any]:
    """Return the value that JSON describes, yielding now and then if it is long.

    Args:
        text: The JSON.
        step_bytes: How much to parse between two yields. Numbers have to be shorter.

    Raises:
        ValueError: If it is no JSON, or one long line is nested deeply.
        RecursionError: If a short one is.
    """
    if len(text) <= step_bytes:
        return json.loads(bytes(text))
    parser = _Parser(memoryview(text), step_bytes)
    value = yield from parser.value(0)
    if parser.peek():
        raise ValueError(f"there is more after the value, at byte {parser.at}")
    return value


class _Parser:
    """Goes through a long text.

    Attributes:
        at: Where it is.
    """

    def __init__(self, text: Buffer, step_bytes: int) -> None:
        self.at = 0
        self._text = text
        self._step_bytes = step_bytes
        self._count = 0

    def peek(self) -> bytes:
        """Skip what is between values, and return the next byte; an empty string at the end."""
        space = _SPACE.match(self._text, self.at, self.at + self._step_bytes)
        self.at = space.end() if space is not None else self.at
        return bytes(self._text[self.at : self.at + 1])

    def value(self, depth: int) -> Generator[None, None, Any]:
        """Return the value that comes next."""
        self._count += 1
        if self._count % _TOKENS == 0:
            yield
        first = self.peek()
        if first == b"[":
            return (yield from self._list(depth + 1))
        if first == b"{":
            return (yield from self._object(depth + 1))
        scalar = _SCALAR.match(self._text, self.at, self.at + self._step_bytes)
        if first == b'"' and scalar is None:
            return (yield from self._string())
        if scalar is None or len(scalar[0]) == self._step_bytes:
            raise ValueError(f"there is no value at byte {self.at}")
        self.at = scalar.end()
        return json.loads(bytes(scalar[0]))

    def _list(self, depth: int) -> Generator[None, None, list[Any]]:
        self._enter(depth)
        found: list[Any] = []
        if self.peek() == b"]":
            self.at += 1
            return found
        while True:
            run = _RUN.match(self._text, self.at, self.at + self._step_bytes)
            if run is not None:
                found += json.loads(b"[" + bytes(run[0])[:-1] + b"]")
                self.at = run.end()
                yield
            found.append((yield from self.value(depth)))
            if self._goes_on(b"]"):
                continue
            return found

    def _object(self, depth: int) -> Generator[None, None, dict[str, Any]]:
        self._enter(depth)
        found: dict[str, Any] = {}
        if self.peek() == b"}":
            self.at += 1
            return found
        while True:
            if self.peek() != b'"':
                raise ValueError(f"there is no key at byte {self.at}")
            key = yield from self.value(depth)
            if self.peek() != b":":
                raise ValueError(f"there is no colon at byte {self.at}")
            self.at += 1
            found[key] = yield from self.value(depth)
            if self._goes_on(b"}"):
                continue
            return found

    def _enter(self, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
        self.at += 1

    def _goes_on(self, end: bytes) -> bool:
        """Return whether another value follows, or the end has come."""
        byte = self.peek()
        if byte not in (b",", end):
            raise ValueError(f"there is neither a comma nor an end at byte {self.at}")
        self.at += 1
        return byte == b","

    def _string(self) -> Generator[None, None, str]:
        """Return a string that is long, or has escapes in it."""
        pieces: list[str] = []
        self.at += 1
        while bytes(self._text[self.at : self.at + 1]) != b'"':
            piece = _TEXT.match(self._text, self.at, self.at + self._step_bytes)
            stop = piece.end() if piece is not None else self.at
            if piece is not None and self.at < piece.start("high") and piece.end("high") == stop:
                # The other half of a pair of surrogates may follow, and only together are they one character.
                stop = piece.start("high")
            if stop == self.at:
                raise ValueError(f"the string ends, or has an escape that is none, at byte {self.at}")
            pieces.append(json.loads(b'"' + bytes(self._text[self.at : stop]) + b'"'))
            self.at = stop
            yield
        self.at += 1
        return "".join(pieces)
