from __future__ import annotations

import asyncio
import gc
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import aiostage
from aiostage import CheckpointNotFoundError
from aiostage.integrations.profiler import ProfilerObserver
from aiostage.observe import observing, span, start_span
from tests.spans import Recorder


def profiled() -> profile:
    """Return a profiler of all threads."""
    config = torch.profiler._ExperimentalConfig(profile_all_threads=True)
    return profile(activities=[ProfilerActivity.CPU], experimental_config=config, acc_events=True)


def events(profiler: profile, path: Path) -> list[dict[str, Any]]:
    profiler.export_chrome_trace(str(path))
    found = json.loads(path.read_text())["traceEvents"]
    return [event for event in found if event["ph"] == "X" and event["name"].startswith("aiostage.")]


@pytest.mark.asyncio
async def test_the_same_spans_beside_operators(tmp_path: Path) -> None:
    tree = {"a": torch.arange(3_000_000.0), "b": [torch.ones(3)], "step": 1}
    recorder, observer = Recorder(), ProfilerObserver()
    with profiled() as profiler, observing(recorder, observer), span("mine"):
        await aiostage.save(tree, tmp_path / "checkpoint", max_shard_bytes=1000)
        await aiostage.load(tmp_path / "checkpoint", into=tree)
        torch.zeros(3).add(1)
    found = events(profiler, tmp_path / "trace.json")
    assert sorted(event["name"] for event in found) == sorted(f"aiostage.{name}" for name in recorder.names)
    assert {"mine", "save", "stage", "walk", "batch", "write", "write part", "digest", "commit", "load"} <= set(
        recorder.names
    )
    lengths = {event["name"]: event["dur"] for event in found}
    assert lengths["aiostage.mine"] >= lengths["aiostage.save"] >= lengths["aiostage.walk"] > 0
    assert len({event["tid"] for event in found}) > 1, "worker threads too"
    assert "aten::add" in {event.name for event in profiler.events()}
    assert not observer._ranges


@pytest.mark.asyncio
async def test_tasks_that_take_turns(tmp_path: Path) -> None:
    turns = [asyncio.Event() for _ in range(3)]

    async def first() -> None:
        with span("first"):
            turns[0].set()
            await turns[1].wait()
        turns[2].set()

    async def second() -> None:
        await turns[0].wait()
        with span("second"):
            turns[1].set()
            await turns[2].wait()

    with profiled() as profiler, observing(ProfilerObserver()):
        await asyncio.gather(first(), second())
    one, other = sorted(events(profiler, tmp_path / "trace.json"), key=lambda event: event["ts"])
    assert (one["name"], other["name"]) == ("aiostage.first", "aiostage.second")
    assert one["ts"] < other["ts"] < one["ts"] + one["dur"] < other["ts"] + other["dur"]


@pytest.mark.asyncio
async def test_a_span_that_fails_and_one_that_ends_in_another_thread(tmp_path: Path) -> None:
    observer = ProfilerObserver()
    with profiled() as profiler, observing(observer):
        with pytest.raises(CheckpointNotFoundError):
            await aiostage.load(tmp_path / "nowhere")
        opened = start_span("elsewhere")
        assert opened is not None
        thread = threading.Thread(target=opened.end)
        thread.start()
        thread.join()
        start_span("dropped")
        gc.collect()
    names = {event["name"]: event["dur"] for event in events(profiler, tmp_path / "trace.json")}
    assert names["aiostage.load"] > 0
    assert names["aiostage.elsewhere"] > 0
    assert not observer._ranges


def test_without_a_profiler() -> None:
    with observing(ProfilerObserver()), span("nothing"):
        pass
