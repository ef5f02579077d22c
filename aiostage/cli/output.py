"""The output of commands: lines for people, with colour on a terminal, or one JSON document for programs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Output", "age", "counted", "escaped", "few", "shortened", "size", "without"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_COLOURS = {"bold": "1", "good": "32", "bad": "31"}
_AGES = ((86400, "d"), (3600, "h"), (60, "min"))
_FEW = 10
_LONGEST_VALUE = 60


class Output:
    """Prints what a command finds.

    Args:
        as_json: Print nothing but one JSON document, when it is closed.

    Attributes:
        data: The document.
        status: The exit status of the program.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.data: dict[str, Any] = {}
        self.status = 0
        self._as_json = as_json
        self._has_colours = (
            sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
        )

    def line(self, text: str = "", colour: str | None = None) -> None:
        """Print a line for people. Its control characters, which may come from a file, are escaped."""
        if self._as_json:
            return
        text = escaped(text)
        if colour is not None and self._has_colours:
            text = f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"
        print(text)

    def complain(self, text: str) -> None:
        """Print one line on stderr."""
        sys.stdout.flush()
        print(escaped(text), file=sys.stderr)

    def flush(self) -> None:
        """Show what was printed so far: a long command shows its progress, also through a pipe."""
        sys.stdout.flush()

    def close(self) -> None:
        """Print the document, if one is wanted."""
        if self._as_json:
            # json.dumps() escapes all control characters but this one.
            print(json.dumps(_finite(self.data), indent=2).replace("\x7f", "\\u007f"))
        sys.stdout.flush()


def escaped(text: str) -> str:
    """Return a text whose control characters are escaped, so that a terminal takes none for a command.

    Keys and values come from files that others have written.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def counted(number: int, thing: str) -> str:
    """Return a number with a noun, in the plural unless it is 1."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def few(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    names = list(names)
    rest = len(names) - _FEW
    return ", ".join(names[:_FEW]) + (f" and {rest:,} more" if rest > 0 else "")


def shortened(text: str) -> str:
    """Return the beginning of a text that is too long for a line."""
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def without(names: Sequence[str]) -> str:
    """Return what follows the kind of a checkpoint some of whose parts are left out."""
    return f", without {few(names)}" if names else ""


def size(nbytes: int) -> str:
    """Return a number of bytes in the unit that suits it."""
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{nbytes} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def age(seconds: float | None) -> str:
    """Return how long ago something was, in the unit that suits it."""
    if seconds is None:
        return "-"
    for unit, name in _AGES:
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0, seconds):.0f} s"


def _finite(value: Any) -> Any:
    """Return a document with text in place of infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_finite(child) for child in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
