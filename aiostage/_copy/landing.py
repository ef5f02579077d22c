"""How far the copies of one staging have come."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter

from aiostage._capture.plan import Batch
from aiostage._copy.flights import Flights
from aiostage._copy.window import Window
from aiostage._loop.workers import Job

__all__ = ["Landing"]


class Landing:
    """Where the copies of one staging come in, for whoever waits for some of them.

    Args:
        job: Of the threads that copy from host memory.

    Attributes:
        flights: The copies from devices; None without an accelerator, and once the staging is over.
        batches: Of the plan.
        window: What the copy passes through, if it is larger than the memory for it.
        memory: The addresses of the staged memory.
        landed: The numbers of the batches that were seen to have been copied.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.flights: Flights | None = None
        self.batches: Sequence[Batch] = ()
        self.window: Window | None = None
        self.memory = range(0)
        self.landed: set[int] = set()

    async def batch(self, number: int) -> bool:
        """Wait until a batch has been copied.

        Returns:
            False if it will not be: the staging has failed, was abandoned or closed.

        Raises:
            StagingError: If the device has failed.

        Cancelling changes nothing.
        """
        if self.window is not None:
            await self.window.launched(number)
        if self.batches[number].device is not None and self.flights is not None:
            await self.flights.land(number)
            self.landed.add(number)
        while number not in self.landed and not self._job.finished():
            await self._job.progressed(self._job.done)
        return number in self.landed

    async def bytes(self, address: int, nbytes: int) -> bool:
        """Wait until the copies into a range of staged memory have been made; elsewhere there is nothing to wait for.

        Returns:
            False if they will not be: the staging has failed, was abandoned or closed.

        Raises:
            StagingError: If the device has failed.

        Cancelling changes nothing.
        """
        start = max(address - self.memory.start, 0)
        stop = min(address + nbytes, self.memory.stop) - self.memory.start
        for number in range(bisect_right(self.batches, start, key=_stop), len(self.batches)):
            if self.batches[number].start >= stop:
                break
            if not await self.batch(number):
                return False
        return True

    def left_in_host_memory(self) -> set[int]:
        """Return the numbers of the batches that threads have still to copy."""
        waiting = (number for number, batch in enumerate(self.batches) if batch.device is None)
        return set(waiting) - self.landed


_stop = attrgetter("stop")
