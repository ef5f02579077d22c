"""Starting a thread without waiting until it runs."""

from __future__ import annotations

import _thread
import threading

__all__ = ["begin"]


def begin(thread: threading.Thread) -> None:
    """Start a thread that was not started; it appears among the threads of the process a moment later.

    ``Thread.start()`` returns when the new thread has had its first turn, for which that waits like any other: where
    all cores are busy an event loop was held for up to 3 ms. So another, internal thread waits for it.

    Args:
        thread: A daemon; what it runs is run at once or, if the interpreter ends, never.

    Raises:
        RuntimeError: If no thread can be had.
    """
    _thread.start_new_thread(_begin, (thread,))


def _begin(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError:
        # There was one thread to be had and not two: so this is it.
        thread.run()
