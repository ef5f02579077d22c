from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import aiostage
from aiostage import AsyncStager, CheckpointExistsError
from aiostage.abc import Span
from aiostage.observe import begin, span
from aiostage.tracing import Trace, trace


def tree() -> dict[str, Any]:
    return {"a": torch.arange(3_000_000.0), "b": [torch.ones(3)], "step": 1}


def events_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in document["traceEvents"] if event["ph"] == "X"]


def assert_nested(document: dict[str, Any]) -> None:
    """Each event of a line lies behind the one before it or inside, as a viewer wants it."""
    lines: dict[int, list[dict[str, Any]]] = {}
    for event in events_of(document):
        lines.setdefault(event["tid"], []).append(event)
    for events in lines.values():
        open_until: list[float] = []
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            while open_until and open_until[-1] <= event["ts"] + 0.002:
                open_until.pop()
            end = event["ts"] + event["dur"]
            assert not open_until or end <= open_until[-1] + 0.002
            open_until.append(end)


@pytest.mark.asyncio
async def test_a_save_and_a_load(tmp_path: Path) -> None:
    with trace() as recorded:
        await aiostage.save(tree(), tmp_path / "checkpoint", max_shard_bytes=1000)
        await aiostage.load(tmp_path / "checkpoint", into=tree())
    await recorded.write(tmp_path / "trace.json")
    document = json.loads((tmp_path / "trace.json").read_text())
    assert document == recorded.chrome()
    assert_nested(document)
    names = {event["name"] for event in events_of(document)}
    assert {"save", "stage", "walk", "copy", "write", "write part", "digest", "commit", "load", "read"} <= names
    for event in events_of(document):
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert event["pid"] == os.getpid()
        assert "unfinished" not in event["args"]
    threads = {event["args"]["name"] for event in document["traceEvents"] if event["ph"] == "M"}
    assert any(name.startswith("aiostage-copy") for name in threads)
    assert len(threads) == len({event["tid"] for event in events_of(document)})


@pytest.mark.asyncio
async def test_a_number_is_no_path_and_is_not_closed() -> None:
    reader, writer = os.pipe()
    with pytest.raises(TypeError):
        await Trace().write(writer)  # type: ignore[arg-type]
    os.close(writer)
    os.close(reader)


@pytest.mark.asyncio
async def test_failures_and_what_is_still_open(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "file").touch()
    with trace() as recorded:
        with pytest.raises(CheckpointExistsError):
            await aiostage.save(tree(), tmp_path / "checkpoint")
        opened = begin("open", path=tmp_path)
    (save,) = (found for found in recorded.spans if found.name == "save")
    assert (recorded.failure(save) or "").startswith("CheckpointExistsError: ")
    by_name = {event["name"]: event for event in events_of(recorded.chrome())}
    assert by_name["save"]["args"]["error"] == recorded.failure(save)
    assert by_name["open"]["args"] == {"path": str(tmp_path), "unfinished": True}
    assert opened is not None
    opened.end()
    by_name = {event["name"]: event for event in events_of(recorded.chrome())}
    assert by_name["open"]["args"] == {"path": str(tmp_path)}
    assert recorded.failure(opened.span) is None


@pytest.mark.asyncio
async def test_tasks_that_take_turns_are_on_lines_of_their_own() -> None:
    turn = asyncio.Event()

    async def first() -> None:
        with span("first"):
            await asyncio.sleep(0)
            turn.set()
            await asyncio.sleep(0)

    async def second() -> None:
        with span("second"):
            await turn.wait()
            for _ in range(3):
                await asyncio.sleep(0)

    with trace() as recorded, span("both"):
        await asyncio.gather(first(), second())
    document = recorded.chrome()
    assert_nested(document)
    lines = {event["name"]: event["tid"] for event in events_of(document)}
    assert lines["first"] == lines["both"] != lines["second"]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.sampled_from("ab"), st.integers(0, 30))))
def test_any_spans_can_be_laid_out(drawn: list[tuple[int, int, str, int]]) -> None:
    recorded = Trace()
    spans: list[Span] = []
    for start, length, thread, parent in sorted(drawn):
        chosen = spans[parent % len(spans)] if spans else None
        begun = recorded.begin + start / 1000
        spans.append(Span("span", chosen, {}, begun, thread, begun + length / 1000))
        recorded.started(spans[-1])
    document = recorded.chrome()
    assert_nested(document)
    assert len(events_of(document)) == len(drawn)


@pytest.mark.asyncio
async def test_a_trace_hears_only_its_own_block() -> None:
    async def stage(stager: AsyncStager) -> Trace:
        with trace() as recorded:
            await stager.stage(tree())
        return recorded

    async with AsyncStager() as stager:
        traces = await asyncio.gather(stage(stager), stage(stager))
        await stager.stage(tree())
    for recorded in traces:
        assert [found.name for found in recorded.spans].count("stage") == 1


@pytest.mark.anyio
async def test_on_trio(tmp_path: Path) -> None:
    with trace() as recorded, span("only"):
        pass
    await recorded.write(tmp_path / "trace.json")
    assert [event["name"] for event in events_of(json.loads((tmp_path / "trace.json").read_text()))] == ["only"]


def test_the_collector_may_end_a_span_where_another_is_recorded() -> None:
    recorder = Trace()
    span = Span("abandoned", None, {}, 0.0, "main")
    recorder.started(span)

    def collect_inside() -> None:
        with recorder._lock:
            recorder.failed(span, GeneratorExit())

    collecting = threading.Thread(target=collect_inside, daemon=True)
    collecting.start()
    collecting.join(10)
    assert recorder.failure(span) == "GeneratorExit: "
