"""A plugin, ``-p tests.bare_system``: takes away what only some systems have, before aiostage looks for it."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

FROM_OS = ("memfd_create", "posix_fallocate", "preadv", "O_DIRECT")
FROM_MMAP = ("MADV_HUGEPAGE", "MADV_NOHUGEPAGE", "MAP_NORESERVE")
FROM_C = ("madvise", "mincore", "renameat2", "sched_yield", "syscall", "timerfd_create", "timerfd_settime", "usleep")


def without(library: type[ctypes.CDLL]) -> type[ctypes.CDLL]:
    class Bare(library):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            if name in FROM_C:
                raise AttributeError(name)
            return super().__getattr__(name)

    return Bare


for name in FROM_OS:
    delattr(os, name)
for name in FROM_MMAP:
    if hasattr(mmap, name):
        delattr(mmap, name)
ctypes.CDLL = without(ctypes.CDLL)  # type: ignore[misc]
ctypes.PyDLL = without(ctypes.PyDLL)  # type: ignore[misc]
