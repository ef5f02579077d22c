"""The publisher and the subscriber of weights for programs without an event loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aiostage.blocking.background import Background, OnBackground
from aiostage.blocking.stager import Snapshot, Stager
from aiostage.errors import WeightsError
from aiostage.storage.locate import Root
from aiostage.weights.inbox import WeightVersion
from aiostage.weights.publisher import WeightPublisher as AsyncPublisher
from aiostage.weights.subscriber import WeightSubscriber as AsyncSubscriber

__all__ = ["WeightPublisher", "WeightSubscriber"]


class _Hosted(OnBackground):
    """A publisher or a subscriber whose event loop runs in a background thread."""

    def __init__(self, end: AsyncPublisher | AsyncSubscriber) -> None:
        super().__init__()
        self._end = end

    def __repr__(self) -> str:
        return f"<blocking {self._end!r}>"

    def open(self) -> None:
        """Begin without ``with``; :meth:`close` ends it. Raises as entering the asynchronous one does."""
        self._enter(None)

    def _enter(self, stager: Stager | None) -> None:
        if self._background is not None:
            raise WeightsError("it was entered before.", remedy="Make a new one for another block.")
        with self._starting(self._end, stager.background() if stager is not None else None, "aiostage-weights"):
            pass

    def _entered(self) -> Background:
        if self._background is None or self._exit is None:
            raise WeightsError(
                f"it was {'not entered' if self._background is None else 'left'}.",
                remedy="Use it inside its `with` block.",
            )
        self._background.check()
        return self._background


class WeightPublisher(_Hosted):
    """An :class:`aiostage.weights.WeightPublisher` whose methods block. Enter it with ``with``.

    Args:
        target: As for the asynchronous one.
        stager: An :class:`aiostage.blocking.Stager`, entered first. It needs ``use_shared_memory=True`` for a socket.
            None: one is made for the block.
        max_versions: As for the asynchronous one.
        timeout: As for the asynchronous one.

    Raises:
        Exception: As the asynchronous one does.
    """

    _end: AsyncPublisher

    def __init__(
        self, target: Root, stager: Stager | None = None, *, max_versions: int = 8, timeout: float = 60.0
    ) -> None:
        if stager is not None and not isinstance(stager, Stager):
            raise TypeError(f"stager must be an aiostage.blocking.Stager, or None, not {type(stager).__qualname__}")
        inner = stager.stager if stager is not None else None
        super().__init__(AsyncPublisher(target, inner, max_versions=max_versions, timeout=timeout))
        self._stager = stager

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions that are alive, in ascending order."""
        return self._end.versions

    def publish(self, state_dict: Any, *, version: int | None = None) -> int:
        """Make weights the newest version, as :meth:`aiostage.weights.WeightPublisher.publish` does.

        Args:
            state_dict: As for that; or an entered :class:`aiostage.blocking.Snapshot` of the publisher's stager.
            version: As for that.

        Returns:
            The number, once subscribers can have it.

        Raises:
            Exception: As that does.
        """
        background = self._entered()
        source = state_dict.on(background) if isinstance(state_dict, Snapshot) else state_dict
        # Called in this thread: the copies follow what was enqueued on its current streams.
        return background.wait(self._end.publish(source, version=version))

    def acknowledged(self, version: int, *, count: int = 1) -> None:
        """Block until subscribers have acknowledged a version, or a later one.

        Args:
            version: As for :meth:`aiostage.weights.WeightPublisher.acknowledged`.
            count: As for that.

        Raises:
            Exception: As that does.
        """
        self._entered().wait(self._end.acknowledged(version, count=count))

    def open(self) -> None:
        """Begin to serve subscribers without ``with``; :meth:`close` ends it.

        Raises:
            Exception: As entering the asynchronous one does.
        """
        self._enter(self._stager)

    def __enter__(self) -> WeightPublisher:
        """Begin to serve subscribers.

        Raises:
            Exception: As entering the asynchronous one does.
        """
        self.open()
        return self


class WeightSubscriber(_Hosted):
    """An :class:`aiostage.weights.WeightSubscriber` whose methods block. Enter it with ``with``, iterate with ``for``.

    Args:
        target: As for the asynchronous one.
        **options: As for the asynchronous one: ``classes``, ``timeout``, ``interval``.

    Raises:
        Exception: As the asynchronous one does.
    """

    _end: AsyncSubscriber

    def __init__(self, target: Root, **options: Any) -> None:
        super().__init__(AsyncSubscriber(target, **options))

    @property
    def connected(self) -> bool:
        """Whether the publisher, or the storage, could be reached at the last exchange."""
        return self._end.connected

    @property
    def newest(self) -> int | None:
        """The newest version that is known of; None before there is one."""
        return self._end.newest

    def get(self) -> WeightVersion:
        """Block until there is a version that is newer than the last one, and return it.

        Raises:
            Exception: As :meth:`aiostage.weights.WeightSubscriber.get` does.
        """
        return self._entered().call(self._end.get)

    def __iter__(self) -> Iterator[WeightVersion]:
        return self

    def __next__(self) -> WeightVersion:
        """Acknowledge the last version, then block as :meth:`get` does."""
        return self._entered().call(self._end.__anext__)

    def __enter__(self) -> WeightSubscriber:
        """Begin to connect."""
        self.open()
        return self
