"""The HTTP side: an API with OpenAPI documents, the page, server-sent events, health and metrics."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, status
from fastapi import Path as InPath
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from feed import Feed
from metrics import render
from pydantic import BaseModel, Field
from supervisor import Job, JobSpec, Settings, Supervisor

__all__ = ["create_app"]

PAGE = Path(__file__).parent / "page.html"
NAME = r"^[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}$"

bearer = HTTPBearer(auto_error=False)
router = APIRouter()


class NewJob(BaseModel):
    """What a job is to do."""

    name: str = Field(pattern=NAME, description="Also the name of its checkpoints' directory.")
    steps: int = Field(2000, gt=0, le=10_000_000)
    seed: int = Field(0, ge=0)
    width: int = Field(512, ge=8, le=8192, description="Units in each hidden layer.")
    pace: float = Field(0.02, ge=0, le=60, description="Seconds that a step takes at least.")


def create_app(settings: Settings, jobs: list[JobSpec], token: str) -> FastAPI:
    """Return the application.

    Args:
        settings: How to run jobs.
        jobs: The ones to start with.
        token: What a client has to show before it may change anything.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.token = token
        app.state.feed = feed = Feed()
        app.state.supervisor = supervisor = Supervisor(settings, feed)
        async with supervisor.running():
            for spec in jobs:
                supervisor.start(spec)
            yield

    app = FastAPI(title="aiostage orchestrator", version="1", lifespan=lifespan)
    app.include_router(router)
    return app


# What the requests below depend on


def the_supervisor(request: Request) -> Supervisor:
    supervisor: Supervisor = request.app.state.supervisor
    return supervisor


TheSupervisor = Annotated[Supervisor, Depends(the_supervisor)]


def the_job(name: Annotated[str, InPath(pattern=NAME)], supervisor: TheSupervisor) -> Job:
    if name not in supervisor.jobs:
        raise HTTPException(status.HTTP_404_NOT_FOUND, f"there is no job named {name!r}")
    return supervisor.jobs[name]


TheJob = Annotated[Job, Depends(the_job)]


def with_token(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
    if given is None or not hmac.compare_digest(given.credentials.encode(), request.app.state.token.encode()):
        raise HTTPException(
            status.HTTP_401_UNAUTHORIZED,
            "changing anything needs the token that the service printed when it started",
            {"WWW-Authenticate": "Bearer"},
        )


CHANGES = [Depends(with_token)]


def _require(job: Job, state: str) -> None:
    if job.state != state:
        raise HTTPException(status.HTTP_409_CONFLICT, f"{job.name} is {job.state}, not {state}")


# For people and machines that watch


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(PAGE, media_type="text/html")


@router.get("/health")
async def health(supervisor: TheSupervisor) -> dict[str, Any]:
    """Say whether the service is up, and how its jobs are."""
    return {"status": "ok", "jobs": {job.name: job.state for job in supervisor.jobs.values()}}


@router.get("/metrics", response_class=Response)
async def metrics(supervisor: TheSupervisor) -> Response:
    """Return metrics in the format of Prometheus."""
    return Response(render(supervisor), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/events", response_class=StreamingResponse)
async def events(supervisor: TheSupervisor) -> StreamingResponse:
    """Stream everything that happens, after the state as it is now, as server-sent events."""
    state = [job.describe() | {"losses": list(job.losses.items())} for job in supervisor.jobs.values()]
    return StreamingResponse(
        supervisor.feed.subscribe(state), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


# Jobs


@router.get("/api/jobs")
async def jobs(supervisor: TheSupervisor) -> list[dict[str, Any]]:
    """Return all jobs with their last checkpoints."""
    return [job.describe() for job in supervisor.jobs.values()]


@router.post("/api/jobs", status_code=status.HTTP_201_CREATED, dependencies=CHANGES)
async def start(new: NewJob, supervisor: TheSupervisor) -> dict[str, Any]:
    """Start a job; it goes on from its last checkpoint if there is one under its name."""
    try:
        return supervisor.start(JobSpec(**new.model_dump())).describe()
    except ValueError as error:
        raise HTTPException(status.HTTP_409_CONFLICT, str(error)) from error


@router.get("/api/jobs/{name}")
async def job(job: TheJob) -> dict[str, Any]:
    """Return one job."""
    return job.describe()


@router.get("/api/jobs/{name}/losses")
async def losses(job: TheJob) -> list[tuple[int, float]]:
    """Return the loss of every step."""
    return list(job.losses.items())


@router.post("/api/jobs/{name}/checkpoint", status_code=status.HTTP_202_ACCEPTED, dependencies=CHANGES)
async def checkpoint(job: TheJob, supervisor: TheSupervisor) -> dict[str, Any]:
    """Ask for a checkpoint now."""
    _require(job, "running")
    return {"id": supervisor.checkpoint(job, "demand").id}


@router.post("/api/jobs/{name}/preempt", status_code=status.HTTP_202_ACCEPTED, dependencies=CHANGES)
async def preempt(job: TheJob, supervisor: TheSupervisor) -> dict[str, Any]:
    """Have the job checkpoint and give its machine back, until it is resumed."""
    _require(job, "running")
    return {"id": supervisor.preempt(job).id}


@router.post("/api/jobs/{name}/resume", status_code=status.HTTP_202_ACCEPTED, dependencies=CHANGES)
async def resume(job: TheJob, supervisor: TheSupervisor) -> dict[str, Any]:
    """Start a preempted job again, from its last checkpoint."""
    _require(job, "preempted")
    supervisor.resume(job)
    return job.describe()
