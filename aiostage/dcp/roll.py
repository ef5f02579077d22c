"""Who has come to a save or load, who has refused, and who was lost, told through the ranks' rendezvous store.

Collectives cannot be left once they have begun, and what a broken one raises names no rank. So every call begins with
a roll call in the store: either all ranks enter the collectives, or none does and all know why. If a collective breaks
all the same, each rank that still can reports it in the store, and the silent ranks are to blame.

A call costs each rank a handful of small messages to the store, whatever the number of ranks; only a failure makes one
of them ask after each rank.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

__all__ = ["RollCall", "StoreLostError"]

GRACE = 5.0
"""Seconds that others get to say something before they are counted as lost. A guess: connections break in
milliseconds when a process dies, and a busy machine is late by seconds."""

_POLL = 0.05
"""Seconds between two looks for the marks of others, after a failure only."""


class StoreLostError(Exception):
    """The store does not answer."""


class RollCall:
    """The marks of one call in the store. Every method but the constructor blocks.

    Args:
        store: Shared by the ranks; used by one thread at a time.
        number: Of the call, the same on all ranks.
        rank: Of this process, in the group.
        size: How many ranks the group has.
    """

    def __init__(self, store: Any, number: int, rank: int, size: int) -> None:
        self._store = store
        self._key = f"aiostage/{number}"
        self._rank = rank
        self._size = size

    def arrive(self, timeout: float) -> Mapping[int, str]:
        """Say that this rank is here, and wait until all are or it is known that not all will be.

        Args:
            timeout: Seconds to wait for the others.

        Returns:
            Nothing if all have come; otherwise who is to blame and for what. All ranks get the same answer.

        Raises:
            StoreLostError: If the store does not answer.
        """
        try:
            self._store.set(f"{self._key}/here/{self._rank}", "")
            if self._store.add(f"{self._key}/arrived", 1) == self._size:
                return self._settle("verdict", {})
            if self._wait("verdict", timeout):
                return self._settle("verdict", {})
            if self._store.add(f"{self._key}/late", 1) > 1 and self._wait("verdict", GRACE):
                # Another rank ran out of patience too and has looked for the absent; one is enough.
                return self._settle("verdict", {})
            absent = self._without("here")
            late = dict.fromkeys(absent, f"it did not arrive within {timeout:g} seconds")
            return self._settle("verdict", late)
        except RuntimeError as error:
            raise StoreLostError(str(error)) from error

    def refuse(self, reason: str) -> bool:
        """Say that this rank will not take part.

        Returns:
            Whether it was in time; otherwise the call was decided before.

        Raises:
            StoreLostError: If the store does not answer.
        """
        mine = {self._rank: reason}
        try:
            return self._settle("verdict", mine) == mine
        except RuntimeError as error:
            raise StoreLostError(str(error)) from error

    def leave(self) -> None:
        """Say that this rank has come out of the collectives whole.

        Raises:
            StoreLostError: If the store does not answer.
        """
        try:
            self._store.set(f"{self._key}/left/{self._rank}", "")
        except RuntimeError as error:
            raise StoreLostError(str(error)) from error

    def answer(self) -> bool:
        """Say that this process lives, if any rank has asked by :meth:`blame`.

        Called now and then from another thread while the call's own is busy with the collectives or with writing.

        Returns:
            Whether it was asked.

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
            The ranks whose process does not answer; or else those that have not come out of the collectives; or else
            a rank that saw them break. All ranks get the same answer.

        Raises:
            StoreLostError: If the store does not answer.
        """
        try:
            self._store.set(f"{self._key}/left/{self._rank}", "")
            self._store.set(f"{self._key}/broken", "")
            deadline = time.monotonic() + GRACE
            while (inside := self._without("left")) and time.monotonic() < deadline:
                if self._store.check([f"{self._key}/blame"]):
                    break
                time.sleep(_POLL)
            silent = self._without("alive", inside)
            lost = dict.fromkeys(silent, "its process was lost")
            lost = lost or dict.fromkeys(inside, "it keeps the others waiting")
            return self._settle("blame", lost or {self._rank: reason})
        except RuntimeError as error:
            raise StoreLostError(str(error)) from error

    def forget(self) -> None:
        """Remove this rank's marks, and the common ones if it is the first, once all have come to a later call.

        Raises:
            StoreLostError: If the store does not answer.
        """
        keys = [f"{mark}/{self._rank}" for mark in ("here", "left", "alive")]
        if self._rank == 0:
            keys += ["arrived", "late", "verdict", "broken", "blame"]
        try:
            for key in keys:
                self._store.delete_key(f"{self._key}/{key}")
        except RuntimeError as error:
            raise StoreLostError(str(error)) from error

    def _settle(self, name: str, failures: Mapping[int, str]) -> dict[int, str]:
        """Decide a question unless it has been decided, and return what was decided."""
        decided = self._store.compare_set(f"{self._key}/{name}", "", json.dumps(failures))
        return {int(rank): reason for rank, reason in json.loads(decided).items()}

    def _wait(self, name: str, timeout: float) -> bool:
        """Wait for a decision, and return whether there is one."""
        key = f"{self._key}/{name}"
        try:
            self._store.wait([key], timedelta(seconds=timeout))
        except RuntimeError:
            # Out of time, or out of order: what comes next will tell.
            return bool(self._store.check([key]))
        return True

    def _without(self, mark: str, ranks: Sequence[int] | None = None) -> list[int]:
        """Return the ranks that have not made a mark, of some or of all."""
        keys = {rank: f"{self._key}/{mark}/{rank}" for rank in (range(self._size) if ranks is None else ranks)}
        if not keys or self._store.check(list(keys.values())):
            return []
        return [rank for rank, key in keys.items() if not self._store.check([key])]
