"""Everything that an operating system may lack, each call with the portable second that stands in for it.

Linux is what aiostage is measured on. Nothing outside this folder asks which system it runs on, or calls what only
some systems have. Calls are looked up once, when their module is imported; what is missing then is done without.

=====================  ==================================================================================
``memfd_create``       a nameless file in /dev/shm; without /proc memory cannot be shared between processes
``posix_fallocate``    each page of shared memory is written to; files grow as they are written
``madvise``            memory goes back when it is unmapped, and has ordinary pages
``O_DIRECT``           reads and writes pass through the page cache
``cachestat``          ``mincore``, which takes five times as long; so too where a filter looks at system calls
``mincore``            every file counts as cached
``preadv``             ``pread``, and a copy
``renameat2``          ``renamex_np`` of macOS, else two renames that readers and later savers can tell from one
``timerfd``            the event loop's own clock, in whole milliseconds
``sched_yield``        a sleep of no length, likewise without the GIL
``F_FULLFSYNC``        macOS only, where ``fsync`` leaves the disk's own cache alone; ``fsync`` elsewhere
=====================  ==================================================================================
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    raise ImportError(
        "aiostage does not support Windows, whose files and locks are not those of POSIX; use it in WSL 2 instead."
    )
