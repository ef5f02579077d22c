"""Waiting for threads to end."""

from __future__ import annotations

import threading
from collections.abc import Collection
from contextlib import suppress
from time import monotonic

SOON = 10.0


def until_none_of(names: str | tuple[str, ...], *, others: Collection[threading.Thread] = ()) -> None:
    """Wait until no thread whose name begins like that is left, apart from others; fail if they go on."""
    deadline = monotonic() + SOON
    while alive := [t for t in threading.enumerate() if t.name.startswith(names) and t not in others]:
        assert monotonic() < deadline, f"{alive} go on"
        for thread in alive:
            # One that is being started cannot be joined yet.
            with suppress(RuntimeError):
                thread.join(SOON)
