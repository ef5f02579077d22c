"""Finding circles of error, traceback and frame, which only the collector can free.

From Python 3.12 on such a circle also keeps the frames that had called those in it, and with them all their locals:
pending checkpoints, leases, tensors. So it is a fault on every Python that it is there.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import aiostage

HOUSE = str(Path(aiostage.__file__).parent)


@contextmanager
def no_circles() -> Iterator[None]:
    """Fail if the block leaves frames of aiostage in circles, unless they have let their locals go."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    flags = gc.get_debug()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        found = [item for item in gc.garbage if isinstance(item, FrameType)]
        names = [
            f"{frame.f_code.co_qualname}:{frame.f_lineno}" for frame in found if is_ours(frame) and has_locals(frame)
        ]
        if names:
            raise AssertionError(f"frames in circles: {', '.join(names)}")
    finally:
        gc.set_debug(flags)
        gc.garbage.clear()
        if enabled:
            gc.enable()


def is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(HOUSE)


def has_locals(frame: FrameType) -> bool:
    return bool(set(frame.f_locals) - set(frame.f_code.co_freevars))
