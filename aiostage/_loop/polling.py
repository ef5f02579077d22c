"""Interim."""

from __future__ import annotations

import anyio

from aiostage.abc import SupportsQuery


async def wait_event(event: SupportsQuery) -> None:
    """Wait."""
    while not event.query():
        await anyio.sleep(0.0002)
