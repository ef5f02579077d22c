"""What commands print: lines for people, with colour on a terminal, or one JSON document for programs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Output", "age", "counted", "escaped", "few", "size"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_COLOURS = {"bold": "1", "good": "32", "bad": "31"}
_AGES = ((86400, "d"), (3600, "h"), (60, "min"))
_FEW = 10


class Output:
    """Prints what a command finds.

    Args:
        as_json: Print nothing but one JSON document, when it is closed.

    Attributes:
        data: The document.
        status: With which the program is to exit.
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
        """Have what was printed appear; of a long command one wants to see how far it is."""
        sys.stdout.flush()

    def close(self) -> None:
        """Print the document, if one is wanted."""
        if self._as_json:
            # ASCII, so that control characters of all kinds but one are escaped.
            print(json.dumps(_finite(self.data), indent=2).replace("\x7f", "\\u007f"))
        sys.stdout.flush()


def escaped(text: str) -> str:
    """Return a text without what a terminal could take for a command, or for the end of the line."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def counted(number: int, thing: str) -> str:
    """Return a number of things."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def few(names: Iterable[str]) -> str:
    """Return some names, and how many there are besides."""
    names = list(names)
    rest = len(names) - _FEW
    return ", ".join(names[:_FEW]) + (f" and {rest:,} more" if rest > 0 else "")


def without(names: Sequence[str]) -> str:
    """Return what is said behind the kind of a checkpoint of which some parts are not described."""
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
    """Return a document without the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_finite(child) for child in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
