"""A barrier in the ranks' rendezvous store: which ranks take part in an operation, which refuse, which are lost.

A rank cannot leave a collective that it has entered, and the error of a broken collective names no rank. Therefore each
operation starts with this barrier: either all ranks enter the collectives, or none does, and all know why. If a
collective breaks later, each rank that still runs reports it in the store. The ranks that do not report are the cause.

An operation costs each rank a few small messages to the store, independent of the number of ranks. Only after a failure
does one rank query the keys of each rank.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

__all__ = ["RankBarrier", "StoreLostError"]

GRACE = 5.0
"""A guess: connections break in milliseconds when a process dies, and a busy machine is late by seconds."""

_POLL = 0.05
"""Seconds between two queries for the keys of other ranks, after a failure only."""


class StoreLostError(Exception):
    """The store does not answer."""


class RankBarrier:
    """The keys of one operation in the store. Every method but the constructor blocks.

    Args:
        store: Shared by the ranks. :meth:`arrive` blocks all other users of this connection to it.
        number: The number of the operation, the same on all ranks.
        rank: The rank of this process, in the group.
        size: How many ranks the group has.
        grace: Seconds that others get to say something before they are counted as lost; None for ``GRACE``.
    """

    def __init__(self, store: Any, number: int, rank: int, size: int, *, grace: float | None = None) -> None:
        self._store = store
        self._key = f"aiostage/{number}"
        self._rank = rank
        self._size = size
        self._grace = GRACE if grace is None else grace

    def arrive(self, timeout: float) -> Mapping[int, str]:
        """Report that this rank is here, and wait until all ranks are, or until one cannot take part.

        Args:
            timeout: Seconds to wait for the others.

        Returns:
            An empty mapping if all ranks have come; otherwise the ranks that failed, with the reason. The same on all
            ranks.

        Raises:
            StoreLostError: If the store does not answer.
        """
        try:
            # In this order: a rank that is counted has its key, so that one that asks who is absent never names it.
            self._store.set(f"{self._key}/here/{self._rank}", "")
            if self._store.add(f"{self._key}/arrived", 1) == self._size:
                return self._settle("verdict", {})
            # In the store and not by asking again and again: one request waits, however many ranks there are.
            if self._wait("verdict", timeout):
                return self._settle("verdict", {})
            if self._store.add(f"{self._key}/overdue", 1) > 1 and self._wait("verdict", self._grace):
                # Another rank has timed out too and queries the absent ranks. One rank is enough.
                return self._settle("verdict", {})
            # Only the one rank that decides asks for each, so a large job that waits does not flood the store.
            absent = self._without("here")
            overdue = dict.fromkeys(absent, f"it did not arrive within {timeout:g} seconds")
            return self._settle("verdict", overdue)
        except RuntimeError as error:
            raise StoreLostError(str(error)) from error

    def refuse(self, reason: str) -> bool:
        """Report that this rank does not take part.

        Returns:
            Whether the report was in time. False: the operation was decided before.

        Raises:
            StoreLostError: If the store does not answer.
        """
        mine = {self._rank: reason}
        try:
            return self._settle("verdict", mine) == mine
        except RuntimeError as error:
            raise StoreLostError(str(error)) from error

    def leave(self) -> None:
        """Report that this rank has left the collectives without an error.

        Raises:
            StoreLostError: If the store does not answer.
        """
        try:
            self._store.set(f"{self._key}/left/{self._rank}", "")
        except RuntimeError as error:
            raise StoreLostError(str(error)) from error

    def answer(self) -> bool:
        """Report that this process is alive, if a rank has asked by :meth:`blame`.

        Another thread calls it repeatedly, while the operation's thread runs collectives or writes.

        Returns:
            Whether a rank has asked.

        Raises:
            StoreLostError: If the store does not answer.
        """
        try:
            asked = bool(self._store.check([f"{self._key}/broken"]))
            if asked:
                self._store.set(f"{self._key}/alive/{self._rank}", "")
        except RuntimeError as error:
            raise StoreLostError(str(error)) from error
        return asked

    def blame(self, reason: str) -> Mapping[int, str]:
        """Report that a collective broke in this rank, and find out which ranks caused it.

        Args:
            reason: What it raised.

        Returns:
            The ranks whose process does not answer. If all answer: those that have not left the collectives. If all
            have left: a rank in which they broke. The same on all ranks.

        Raises:
            StoreLostError: If the store does not answer.
        """
        try:
            # First, so that the ranks that see the second key do not take this one for a rank that is still inside.
            self._store.set(f"{self._key}/left/{self._rank}", "")
            self._store.set(f"{self._key}/broken", "")
            deadline = time.monotonic() + self._grace
            while (inside := self._without("left")) and time.monotonic() < deadline:
                if self._store.check([f"{self._key}/blame"]):
                    break
                time.sleep(_POLL)
            # A thread beside the collectives answers for each process that lives; one that does not answer is gone or
            # suspended.
            silent = self._without("alive", inside)
            lost = dict.fromkeys(silent, "its process was lost")
            lost = lost or dict.fromkeys(inside, "it keeps the others waiting")
            return self._settle("blame", lost or {self._rank: reason})
        except RuntimeError as error:
            raise StoreLostError(str(error)) from error

    def forget(self) -> None:
        """Delete this rank's keys (rank 0: also the common keys), once all ranks have come to a later operation.

        Raises:
            StoreLostError: If the store does not answer.
        """
        keys = [f"{state}/{self._rank}" for state in ("here", "left", "alive")]
        if self._rank == 0:
            keys += ["arrived", "overdue", "verdict", "broken", "blame"]
        try:
            for key in keys:
                self._store.delete_key(f"{self._key}/{key}")
        except RuntimeError as error:
            raise StoreLostError(str(error)) from error

    def _settle(self, name: str, failures: Mapping[int, str]) -> dict[int, str]:
        """Decide a question unless it has been decided, and return what was decided."""
        # The store compares and sets in one step, so the first rank's answer is that of all.
        decided = self._store.compare_set(f"{self._key}/{name}", "", json.dumps(failures))
        return {int(rank): reason for rank, reason in json.loads(decided).items()}

    def _wait(self, name: str, timeout: float) -> bool:
        """Wait for a decision, and return whether there is one."""
        key = f"{self._key}/{name}"
        try:
            self._store.wait([key], timedelta(seconds=timeout))
        except RuntimeError:
            # It timed out or the store is lost. The next request shows which of them.
            return bool(self._store.check([key]))
        return True

    def _without(self, state: str, ranks: Sequence[int] | None = None) -> list[int]:
        """Return the ranks that have not set the key of a state, of some ranks or of all."""
        keys = {rank: f"{self._key}/{state}/{rank}" for rank in (range(self._size) if ranks is None else ranks)}
        if not keys or self._store.check(list(keys.values())):
            return []
        return [rank for rank, key in keys.items() if not self._store.check([key])]
