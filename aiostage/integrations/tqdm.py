"""A progress bar for saves and loads."""

from __future__ import annotations

from functools import singledispatchmethod
from typing import Any

from aiostage._extras import needed_for
from aiostage.checkpoint.progress import LoadProgress, Progress, SaveProgress
from aiostage.errors import shown

with needed_for("the bar of progress=True"):
    from tqdm.auto import tqdm
    from tqdm.std import TqdmDefaultWriteLock

__all__ = ["ProgressBar"]


class _Bar(tqdm):  # type: ignore[misc]  # it has no types
    # Every report redraws the bar. tqdm's monitor is for bars without updates, and its thread would outlive all bars.
    monitor_interval = 0


# The lock of all bars in this process. tqdm's default adds a lock of multiprocessing, for which Python 3.14 creates a
# file.
_Bar.set_lock(TqdmDefaultWriteLock.th_lock)


class ProgressBar:
    """Shows one save or load on stderr: bytes, rate, time left. Call it from one thread.

    Args:
        title: The text before the bar.
        **options: For ``tqdm``.
    """

    def __init__(self, title: str, **options: Any) -> None:
        self._bar = _Bar(
            desc=title, total=0, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True, **options
        )

    @singledispatchmethod
    def show(self, progress: Progress) -> None:
        """Show how far it has come."""
        raise TypeError(f"there is no bar for {shown(progress)}")

    @show.register
    def _(self, progress: SaveProgress) -> None:
        if progress.written_bytes < progress.staged_bytes:
            staged = _Bar.format_sizeof(progress.staged_bytes, "B", 1024)
            self._bar.set_postfix_str(f"{staged} staged", refresh=False)
        self._advance(progress.written_bytes, progress.total_bytes)

    @show.register
    def _(self, progress: LoadProgress) -> None:
        self._advance(progress.read_bytes, progress.total_bytes)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def _advance(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
