"""Running loops in threads at once, and waiting for threads to end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import monotonic

from tests.patience import seconds

SOON = seconds(10.0)
_POLL_AGAIN = 0.2


def in_two_threads(run: Callable[[int], object]) -> None:
    """Call a function with 0 and with 1 in two threads at once, and raise what either has raised."""
    with ThreadPoolExecutor(2) as pool:
        for outcome in [pool.submit(run, number) for number in range(2)]:
            outcome.result()


def until_none_of(names: str | tuple[str, ...], *, others: Collection[threading.Thread] = ()) -> None:
    """Wait until no thread whose name begins like that is left, apart from others; fail if they go on."""
    deadline = monotonic() + SOON
    while True:
        # What an error's traceback keeps alive is often a circle, the owner of threads among it; and the last time,
        # another thread may still have held on to it.
        gc.collect()
        alive = [t for t in threading.enumerate() if t.name.startswith(names) and t not in others]
        if not alive:
            return
        assert monotonic() < deadline, f"{alive} go on"
        for thread in alive:
            # One that is being started cannot be joined yet.
            with suppress(RuntimeError):
                thread.join(_POLL_AGAIN)
