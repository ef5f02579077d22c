"""What workers and the evaluator may tell the service. Everything else is an error of the process that said it."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter

__all__ = [
    "CheckpointReached",
    "Delay",
    "Ended",
    "EvaluatorEvent",
    "Opened",
    "Progress",
    "Ready",
    "Scored",
    "Started",
    "Step",
    "Weights",
    "WorkerEvent",
    "evaluator_event",
    "worker_event",
]

Number: TypeAlias = Annotated[int, Field(ge=0, le=2**63 - 1)]
Text: TypeAlias = Annotated[str, Field(max_length=2000)]


class _Event(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Started(_Event):
    event: Literal["started"]
    step: Number


class Step(_Event):
    event: Literal["step"]
    step: Number
    loss: float  # may be NaN: training diverges


class Delay(_Event):
    """How late the worker's event loop was at worst since the last of these, in seconds."""

    event: Literal["delay"]
    at: FiniteFloat
    worst: Annotated[FiniteFloat, Field(ge=0)]


class CheckpointReached(_Event):
    event: Literal["checkpoint"]
    id: Annotated[str, Field(max_length=40)]
    stage: Literal["staging", "captured", "committed", "failed", "skipped"]
    at: FiniteFloat
    reason: Text = ""
    step: Number | None = None
    nbytes: Number | None = None
    error: str | None = None


class Progress(_Event):
    event: Literal["progress"]
    step: Number
    written: Number
    total: Number


class Weights(_Event):
    event: Literal["weights"]
    step: Number
    handle: str


class Ended(_Event):
    event: Literal["preempted", "finished"]
    step: Number


class Ready(_Event):
    event: Literal["ready"]


class Opened(_Event):
    """The evaluator has opened weights, or could not: in both cases the worker may drop them."""

    event: Literal["opened", "missed"]
    job: str
    step: Number


class Scored(_Event):
    event: Literal["score"]
    job: str
    step: Number
    loss: float
    accuracy: FiniteFloat


WorkerEvent: TypeAlias = Started | Step | Delay | CheckpointReached | Progress | Weights | Ended
EvaluatorEvent: TypeAlias = Ready | Opened | Scored

_worker: TypeAdapter[WorkerEvent] = TypeAdapter(Annotated[WorkerEvent, Field(discriminator="event")])
_evaluator: TypeAdapter[EvaluatorEvent] = TypeAdapter(Annotated[EvaluatorEvent, Field(discriminator="event")])


def worker_event(line: bytes) -> WorkerEvent:
    """Return the event in a line from a worker.

    Raises:
        ValueError: If it is none.
    """
    return _worker.validate_json(line)


def evaluator_event(line: bytes) -> EvaluatorEvent:
    """Return the event in a line from the evaluator.

    Raises:
        ValueError: If it is none.
    """
    return _evaluator.validate_json(line)
