from __future__ import annotations

from pathlib import Path

import pytest
import torch
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import aiostage
from aiostage import CheckpointNotFoundError
from aiostage.integrations.opentelemetry import OpenTelemetryObserver
from aiostage.observe import observing
from tests.spans import Recorder


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


@pytest.mark.asyncio
async def test_the_same_spans(tmp_path: Path, exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    tracer = provider.get_tracer("tests")
    recorder = Recorder()
    with observing(recorder, OpenTelemetryObserver(tracer)), tracer.start_as_current_span("mine") as mine:
        await aiostage.save({"a": torch.zeros(100)}, tmp_path / "checkpoint")
    finished = {span.context.span_id: span for span in exporter.get_finished_spans() if span.context is not None}
    ours = [span for span in finished.values() if span.name.startswith("aiostage.")]
    assert sorted(span.name for span in ours) == sorted(f"aiostage.{name}" for name in recorder.names)

    def parent(span: ReadableSpan) -> ReadableSpan:
        assert span.parent is not None
        return finished[span.parent.span_id]

    (save,) = (span for span in ours if span.name == "aiostage.save")
    assert parent(save).name == "mine"
    assert save.attributes == {"aiostage.target": "checkpoint"}
    (walk,) = (span for span in ours if span.name == "aiostage.walk")
    assert parent(walk).name == "aiostage.stage"
    assert parent(parent(walk)) is save
    for span in ours:
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.context is not None
        assert span.context.trace_id == mine.get_span_context().trace_id
        assert mine.start_time <= span.start_time <= span.end_time <= mine.end_time  # type: ignore[attr-defined]
        assert span.status.status_code is StatusCode.UNSET


@pytest.mark.asyncio
async def test_errors(tmp_path: Path, exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    with observing(OpenTelemetryObserver(provider.get_tracer("tests"))), pytest.raises(CheckpointNotFoundError):
        await aiostage.load(tmp_path / "nowhere")
    (load,) = (span for span in exporter.get_finished_spans() if span.name == "aiostage.load")
    assert load.parent is None
    assert load.status.status_code is StatusCode.ERROR
    assert "CheckpointNotFoundError" in (load.status.description or "")
    assert [event.name for event in load.events] == ["exception"]


def test_a_span_that_began_before_anybody_listened(exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    from aiostage.observe import span

    with (
        observing(Recorder()),
        span("outside"),
        observing(OpenTelemetryObserver(provider.get_tracer("tests"))),
        span("inside"),
    ):
        pass
    (inside,) = exporter.get_finished_spans()
    assert inside.parent is None
