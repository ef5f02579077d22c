"""Arguments that a type checker has not seen: refused by name before anything is written, read or removed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import aiostage
import aiostage.blocking
from aiostage.checkpoint import register
from aiostage.storage import LocalStorage

STATE = {"a": torch.ones(3), "step": 1}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"overwrite": "false"}, "overwrite must be True or False, not 'false'"),
        ({"overwrite": None}, "overwrite"),
        ({"max_shard_bytes": "5GB"}, "max_shard_bytes must be an integer, not '5GB'"),
        ({"max_shard_bytes": 5e9}, "max_shard_bytes"),
        ({"progress": 1}, "progress must be True, a function of one argument, or None, not 1"),
        ({"progress": 0.0}, "progress"),
        ({"progress": torch.ones(2)}, "progress"),
    ],
)
async def test_save(arguments: Any, reason: str, tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    await aiostage.save(STATE, target)
    with pytest.raises(TypeError, match=reason):
        await aiostage.save({"other": 1}, target, **arguments)
    assert (await aiostage.load(target))["step"] == 1
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["verify", "in_place"])
async def test_load(name: str, tmp_path: Path) -> None:
    await aiostage.save(STATE, tmp_path / "checkpoint")
    options: Any = {name: "no"}
    with pytest.raises(TypeError, match=f"{name} must be True or False, not 'no'"):
        await aiostage.load(tmp_path / "checkpoint", into={"a": torch.zeros(3), "step": 0}, **options)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"progress": []}, "progress must be True, a function of one argument, or None, not list of 0"),
        ({"backend": "cuda"}, "backend must be an aiostage.Backend, or None for torch.accelerator, not 'cuda'"),
        ({"backend": 1, "into": {"a": torch.zeros(3)}}, "backend"),
    ],
)
async def test_options_of_a_load(arguments: Any, reason: str, tmp_path: Path) -> None:
    await aiostage.save(STATE, tmp_path / "checkpoint")
    with pytest.raises(TypeError, match=reason):
        await aiostage.load(tmp_path / "checkpoint", **arguments)


@pytest.mark.asyncio
@pytest.mark.parametrize("flag", [True, False])
async def test_bools_of_numpy_are_flags_by_their_values(flag: bool, tmp_path: Path) -> None:
    target, numpy_flag = tmp_path / "checkpoint", cast("bool", np.bool_(flag))
    await aiostage.save(STATE, target, progress=numpy_flag, duplicate_tied=numpy_flag)
    saving = aiostage.save({**STATE, "step": 2}, target, overwrite=numpy_flag)
    if flag:
        await saving
    else:
        with pytest.raises(aiostage.CheckpointExistsError):
            await saving
    live = {"a": torch.zeros(3), "step": 0, "more": torch.zeros(1)}
    loading = aiostage.load(target, into=live, strict=numpy_flag, verify=numpy_flag, in_place=numpy_flag)
    if flag:
        with pytest.raises(aiostage.CheckpointMismatchError):
            await loading
    else:
        await loading
        assert live["step"] == 1
    if flag:
        assert (await aiostage.load(target, strict=numpy_flag))["step"] == 2
    else:
        with pytest.raises(ValueError, match="pass into="):
            await aiostage.load(target, strict=numpy_flag)


@pytest.mark.asyncio
@pytest.mark.parametrize("progress", [None, False, np.False_, 0])
async def test_no_progress(progress: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with aiostage.Checkpointer(tmp_path, progress=progress) as checkpoints:
        await (await checkpoints.save(np.int64(3), STATE)).committed()  # type: ignore[arg-type]
        assert (await checkpoints.restore(progress=progress))["step"] == 1
    assert capfd.readouterr().err == ""


@pytest.mark.asyncio
async def test_the_bar_of_a_bool_of_numpy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    await aiostage.save(STATE, tmp_path / "checkpoint", progress=cast("bool", np.True_))
    assert "saving" in capfd.readouterr().err


@pytest.mark.asyncio
async def test_the_backend_of_a_restore(tmp_path: Path) -> None:
    async with aiostage.Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match=r"backend must be an aiostage.Backend, .*, not 'cuda'"):
            await checkpoints.restore(backend="cuda")


@pytest.mark.parametrize("make", [aiostage.Checkpointer, aiostage.blocking.Checkpointer])
@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        # A run that is meant to keep all would be left with one.
        ({"keep": True}, TypeError, r"keep must be an integer \(None to keep all\), not True"),
        ({"keep": 0}, ValueError, r"keep must be an integer of at least 1 \(None to keep all\), not 0"),
        ({"max_in_flight": True}, TypeError, "max_in_flight"),
        ({"incremental": "no"}, TypeError, "incremental must be True or False, not 'no'"),
        ({"duplicate_tied": 1}, TypeError, "duplicate_tied must be True or False, not 1"),
        ({"max_shard_bytes": 5e9}, TypeError, "max_shard_bytes must be an integer"),
        ({"max_shard_bytes": 0}, ValueError, "max_shard_bytes must be an integer of at least 1, not 0"),
        # Found out with the first save, it would end that in the background.
        ({"progress": "bar"}, TypeError, "progress must be True, a function of one argument, or None, not 'bar'"),
        ({"save_on_signals": signal.SIGTERM}, TypeError, r"a list of signals, such as \[signal.SIGTERM\]"),
        ({"save_on_signals": ["SIGTERM"]}, ValueError, "not 'SIGTERM'"),
        ({"save_on_signals": [signal.SIGKILL]}, ValueError, "can be handled"),
        ({"save_on_signals": [12345]}, ValueError, "not 12345"),
    ],
)
def test_checkpointer(make: Any, arguments: Any, error: type[Exception], reason: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=reason):
        make(tmp_path, **arguments)


@pytest.mark.asyncio
async def test_as_many_at_once_as_a_number_of_numpy_says(tmp_path: Path) -> None:
    async with aiostage.Checkpointer(tmp_path, max_in_flight=np.int64(2)) as checkpoints:
        await checkpoints.save(1, STATE)
    assert await checkpoints.steps() == [1]


@pytest.mark.parametrize(("root", "error"), [(None, TypeError), (7, TypeError), (["runs"], TypeError)])
def test_the_root_of_a_local_storage(root: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="the root of a LocalStorage is a path, not "):
        LocalStorage(root)
    with pytest.raises(ValueError, match="null byte"):
        LocalStorage("runs\0")


@pytest.mark.parametrize("functions", [(1, 2), (None, len), ("flatten", len), (len, "unflatten")])
def test_functions_of_a_registered_class(functions: Any) -> None:
    with pytest.raises(TypeError, match="flatten"):
        register(type("NotRegistered", (), {}), *functions)


@pytest.mark.asyncio
async def test_snapshot() -> None:
    async with aiostage.AsyncStager() as stager:
        with pytest.raises(TypeError, match="streamed must be True or False, not 'no'"):
            stager.snapshot(STATE, streamed="no")  # type: ignore[arg-type]
        # A text would be taken apart into its letters.
        async with stager.snapshot(STATE) as snapshot:
            for path in ("a", b"a", 3, None):
                with pytest.raises(TypeError, match="path_prefix: a path is a tuple of keys, indices and attribute"):
                    await snapshot.source_free(path)  # type: ignore[arg-type]
            await snapshot.source_free(["a"])  # type: ignore[arg-type]
        for parts in ("a", 3, ["a"], [("a",), None]):
            async with stager.snapshot(STATE) as snapshot:
                with pytest.raises(TypeError, match="parts: a path is a tuple of keys, indices and attribute names"):
                    snapshot.order_before(parts=parts)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_steps(tmp_path: Path) -> None:
    async with aiostage.Checkpointer(tmp_path) as checkpoints:
        await checkpoints.save(5, STATE)
    for call in (checkpoints.restore, checkpoints.delete):
        with pytest.raises(ValueError, match="a step must be an integer of at least 0, not -1"):
            await call(step=-1)
        with pytest.raises(TypeError, match="a step must be an integer, not '5'"):
            await call(step="5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"restore\(step=5\)"):
        await checkpoints.restore(5)
    assert await checkpoints.steps() == [5]
