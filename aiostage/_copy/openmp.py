"""How many threads torch divides the work of one call among."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["one_thread"]


def _openmp() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """Return how the number of threads is read and set that torch divides work among, if it uses OpenMP."""
    libraries = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            # PyDLL: a call is far shorter than giving the GIL away and getting it back.
            library = ctypes.PyDLL(str(libraries / name))
            return library.omp_get_max_threads, library.omp_set_num_threads
        except (OSError, AttributeError):
            continue
    return None


_threads = _openmp()


@contextmanager
def one_thread() -> Generator[None, None, None]:
    """Keep torch from dividing what the calling thread does among threads of its own.

    There would be as many of them as cores, for each of several workers, and they go on spinning for a while in case
    there is more to do, on cores that the event loop and the training step want. ``torch.set_num_threads`` would
    apply to the whole process; this applies to the calling thread. Without OpenMP it does nothing.
    """
    if _threads is None:
        yield
        return
    read, write = _threads
    # On its first use in a thread torch sets what the process is set to.
    torch.get_num_threads()
    before = read()
    write(1)
    try:
        yield
    finally:
        write(before)
