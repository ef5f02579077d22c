"""obstore needs asyncio; on trio the error says so."""

from __future__ import annotations

import pytest
from obstore.store import MemoryStore

from aiostage import CheckpointError
from aiostage.storage import ObjectStorage


@pytest.mark.anyio
async def test_trio_gets_an_error() -> None:
    with pytest.raises(CheckpointError, match="cannot be awaited on trio"):
        await ObjectStorage(MemoryStore()).list()
