from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage.checkpoint.progress import LoadProgress, SaveProgress


def tree() -> dict[str, Any]:
    return {"large": torch.arange(6_000_000.0), "small": torch.zeros(3), "step": 1}


@pytest.mark.asyncio
@pytest.mark.parametrize("verify", [True, False])
async def test_a_load_reports_its_progress(tmp_path: Path, verify: bool) -> None:
    saved: list[SaveProgress] = []
    # In two files, because a load reads up to 32 MiB of one before it reports.
    large = {"second": torch.arange(3_000_000.0)}
    await aiostage.save(tree() | large, tmp_path / "step-1", max_shard_bytes=1000, progress=saved.append)
    loaded: list[LoadProgress] = []
    await aiostage.load(tmp_path / "step-1", verify=verify, progress=loaded.append)
    read = [event.read_bytes for event in loaded]
    assert read == sorted(read)
    assert len(read) > 2
    assert {event.name for event in (*saved, *loaded)} == {"step-1"}
    assert {event.total_bytes for event in loaded} == {read[-1]}
    assert saved[-1].written_bytes == saved[-1].staged_bytes == saved[-1].total_bytes
    # The index is read only to be verified.
    assert (read[-1] == saved[-1].total_bytes) == verify


@pytest.mark.asyncio
async def test_what_progress_raises_ends_the_load(tmp_path: Path) -> None:
    await aiostage.save(tree(), tmp_path / "step-1")
    live = {"large": torch.zeros(6_000_000), "small": torch.ones(3), "step": 0}

    def refuse(event: LoadProgress) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        await aiostage.load(tmp_path / "step-1", into=live, progress=refuse)
    assert not live["large"].any()
    assert live["step"] == 0


@pytest.mark.asyncio
async def test_neither_a_bool_nor_a_function(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="progress must be True, a function of one argument, or None, not 'yes'"):
        await aiostage.save(tree(), tmp_path / "step-1", progress="yes")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    await aiostage.save(tree(), tmp_path / "step-1", progress=False)


@pytest.mark.asyncio
async def test_a_function_that_counts_as_false(tmp_path: Path) -> None:
    class Noted(list[Any]):
        def __call__(self, event: Any) -> None:
            self.append(event)

    saved, loaded = Noted(), Noted()
    await aiostage.save(tree(), tmp_path / "step-1", progress=saved)
    await aiostage.load(tmp_path / "step-1", progress=loaded)
    assert saved
    assert loaded
