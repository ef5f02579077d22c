"""Where tests have found :func:`at_every_await` so far."""

from aiostage.testing.cancelling import CancelledAt, at_every_await

__all__ = ["CancelledAt", "at_every_await"]
