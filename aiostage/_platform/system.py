"""Which system this is, and the functions of its C library."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from typing import Any

__all__ = [
    "BUILT_FOR_LINUX",
    "HAS_PROC",
    "HAS_USUAL_FLAGS",
    "NOT_SUPPORTED",
    "c_library",
    "c_library_with_gil",
    "find",
]

NOT_SUPPORTED = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY))
"""What a kernel or a file system says that does not have what it was asked for."""

BUILT_FOR_LINUX = sys.platform == "linux"
HAS_PROC = os.path.isdir("/proc/self/fd")
HAS_USUAL_FLAGS = BUILT_FOR_LINUX and platform.machine() in ("x86_64", "aarch64", "riscv64", "s390x", "loongarch64")
"""Whether flags and system calls have the numbers that they have on most processors."""


def find(name: str, library: Any) -> Any:
    """Return a function of the C library, or None where there is no such function."""
    try:
        return getattr(library, name)
    except AttributeError:
        return None


c_library = ctypes.CDLL(None, use_errno=True)
# Not CDLL for what is over at once: that gives up the GIL around each call, and a busy worker thread may not hand it
# back for 5 ms.
c_library_with_gil = ctypes.PyDLL(None, use_errno=True)
