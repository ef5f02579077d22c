"""What it costs to read a local checkpoint: counted, since timings depend on the machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage.checkpoint import part_reader
from aiostage.format.parts import PART_BYTES
from tests.checkpoint.comparing import assert_same

PARTS = 6


def tree() -> dict[str, Any]:
    return {str(number): torch.randn(PART_BYTES // 4) for number in range(PARTS)}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and length of each call that reads a file."""
    found: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(number: int, buffers: list[memoryview], offset: int) -> int:
        found.append((offset, sum(map(len, buffers))))
        return real(number, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return found


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were copied from buffers, a number for each part."""
    found: list[int] = []

    def counting(real: Callable[..., None]) -> Callable[..., None]:
        def scatter(part: Any, buffer: torch.Tensor) -> None:
            found.append(part.nbytes)
            real(part, buffer)

        return scatter

    monkeypatch.setattr(part_reader, "scatter", counting(part_reader.scatter))
    return found


@pytest.mark.asyncio
async def test_large_tensors_are_read_to_where_they_belong(
    tmp_path: Path, reads: list[tuple[int, int]], copied: list[int]
) -> None:
    saved = tree()
    await aiostage.save(saved, tmp_path / "checkpoint")
    reads.clear()
    assert_same(saved, await aiostage.load(tmp_path / "checkpoint"))
    # The header is read together with what is behind it.
    assert copied == [PART_BYTES]
    # So that a kernel that does not preempt what runs inside it lets the event loop run soon.
    assert max(nbytes for _, nbytes in reads) <= 512 << 10


@pytest.mark.asyncio
async def test_unselected_bytes_are_read_only_to_verify_them(
    tmp_path: Path, reads: list[tuple[int, int]], copied: list[int]
) -> None:
    saved = tree()
    await aiostage.save(saved, tmp_path / "checkpoint")
    for verify, most in ((True, 3 * PART_BYTES), (False, PART_BYTES)):
        reads.clear()
        copied.clear()
        loaded = await aiostage.load(tmp_path / "checkpoint", only="3", verify=verify)
        assert_same({"3": saved["3"]}, loaded)
        assert not copied
        assert PART_BYTES <= sum(nbytes for _, nbytes in reads) < most + (1 << 20)


@pytest.mark.one_loop
@pytest.mark.asyncio
async def test_a_part_of_many_small_tensors_is_read_at_once(
    tmp_path: Path, reads: list[tuple[int, int]], copied: list[int]
) -> None:
    saved = {str(number): torch.randn(4096) for number in range(1000)}
    await aiostage.save(saved, tmp_path / "checkpoint")
    reads.clear()
    assert_same(saved, await aiostage.load(tmp_path / "checkpoint"))
    assert len(copied) == 2
    assert len(reads) < 60


@pytest.mark.asyncio
@pytest.mark.parametrize("where", [2.5, PARTS - 0.5])
async def test_damage_in_what_is_read_piece_by_piece(tmp_path: Path, where: float) -> None:
    await aiostage.save(tree(), tmp_path / "checkpoint")
    with (tmp_path / "checkpoint" / "model.safetensors").open("r+b") as file:
        file.seek(int(where * PART_BYTES))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(aiostage.CheckpointCorruptError, match="do not match their checksum"):
        await aiostage.load(tmp_path / "checkpoint")
    with pytest.raises(aiostage.CheckpointCorruptError, match="do not match their checksum"):
        await aiostage.load(tmp_path / "checkpoint", only=str(int(where)))
