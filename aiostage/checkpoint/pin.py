"""Keeping others from removing what a checkpoint that is being written is going to refer to.

A pin is a draft that is never committed, under a name that tells what it pins. So a storage knows of it what it knows
of every draft: whether its writer lives, and what to do if not.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager

from aiostage.abc import Buffer, Storage
from aiostage.checkpoint.save import give_up
from aiostage.format.steps import pin_of

__all__ = ["pinned"]

_FILE = "pin"
_CONTENT = memoryview(b"Somebody is writing a checkpoint that refers to this one.\n")


@asynccontextmanager
async def pinned(storage: Storage, name: str) -> AsyncGenerator[None, None]:
    """Keep a checkpoint, and what it refers to, from being removed.

    Args:
        storage: Where it is.
        name: What it is called. It may have been removed before; look for it inside the block.

    Raises:
        OSError: If the storage refuses.

    When cancelled, nothing is left behind.
    """
    draft = await storage.open(pin_of(name))
    try:
        async with aclosing(_parts()) as parts:
            await draft.write(_FILE, len(_CONTENT), parts)
        yield
    except BaseException as error:
        await give_up(draft, error)
        raise
    await draft.abort()


async def _parts() -> AsyncGenerator[Buffer, None]:
    yield _CONTENT
