"""Coroutines that plain functions return."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["named"]

T = TypeVar("T")


def named(coroutine: Coroutine[Any, Any, T], name: str) -> Coroutine[Any, Any, T]:
    """Give a coroutine the name of the public function that returns it, by which Python warns if it is never awaited.

    Args:
        coroutine: As an ``async def`` function returns it.
        name: Such as ``AsyncStager.stage``.
    """
    coroutine.__qualname__ = name  # type: ignore[attr-defined]
    return coroutine
