"""The HTTP side: an API with OpenAPI documents, the page, server-sent events, health and metrics."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, status
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, StreamingResponse
from fastapi.security import HTTPBearer
from guard import MOST_BODY_BYTES, Guard
from metrics import render
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from supervisor import Job, JobSpec, Score, Status, Supervisor

__all__ = ["create_app"]

PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
NAME = r"^[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}$"
MOST = 2**53 - 1
"""The largest integer that every client of JSON reads as it is."""


# JSON does not tell 5 from 5.0, and JSON Schema calls both an integer.
Whole = Annotated[
    int, BeforeValidator(lambda given: int(given) if isinstance(given, float) and given.is_integer() else given)
]


class NewJob(BaseModel):
    """What a job is to do."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=NAME, description="Also the name of its checkpoints' directory.")
    steps: Whole = Field(2000, gt=0, le=10_000_000)
    seed: Whole = Field(0, ge=0, le=MOST)
    width: Whole = Field(512, ge=8, le=8192, description="Units in each hidden layer.")
    pace: float = Field(0.02, ge=0, le=60, allow_inf_nan=False, description="Seconds that a step takes at least.")


class Refusal(BaseModel):
    """Why a request was refused."""

    detail: str


class Loss(BaseModel):
    """The loss of a step."""

    step: int
    loss: float | None


class Asked(BaseModel):
    """The checkpoint that was asked for."""

    id: str


class Health(BaseModel):
    """Whether the service is up, and the state of each job."""

    status: str
    jobs: dict[str, str]


def create_app(supervisor: Supervisor, token: str, *, hosts: Collection[str] = ()) -> FastAPI:
    """Return the application.

    Args:
        supervisor: Runs the jobs.
        token: What a client has to show before it may change anything.
        hosts: Names of this service beside localhost and its addresses.
    """
    app = FastAPI(title="aiostage orchestrator", version="1", docs_url=None, redoc_url=None)
    app.state.supervisor = supervisor
    app.include_router(router)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_middleware(Guard, token=token, hosts=hosts, headers=HEADERS)
    return app


def refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Describe how requests may be refused, for the OpenAPI documents."""
    reasons = {
        400: "The host or the body cannot be read, or the host is not ours.",
        401: "The token is missing or wrong.",
        404: "There is no such job.",
        409: "The job is not in a state for that.",
        413: f"The body has more than {MOST_BODY_BYTES} bytes.",
    }
    return {code: {"model": Refusal, "description": reasons[code]} for code in (400, *codes, 413)}


async def invalid(request: Request, error: Exception) -> Response:
    """Say what is wrong with a request, without what was sent: NaN and lone surrogates have no JSON of their own."""
    assert isinstance(error, RequestValidationError)
    detail = [{"loc": wrong["loc"], "msg": wrong["msg"], "type": wrong["type"]} for wrong in error.errors()]
    return Response(json.dumps({"detail": detail}), 422, media_type="application/json")


SCRIPT = PAGE.partition("<script>")[2].partition("</script>")[0]
# Pages load nothing from elsewhere.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}


# What the requests below depend on. The guard has checked the token; the scheme is named for the OpenAPI documents.

router = APIRouter(responses=refusals())
CHANGES = [Depends(HTTPBearer(auto_error=False))]


def the_supervisor(request: Request) -> Supervisor:
    supervisor: Supervisor = request.app.state.supervisor
    return supervisor


TheSupervisor = Annotated[Supervisor, Depends(the_supervisor)]


def the_job(name: Annotated[str, InPath(pattern=NAME)], supervisor: TheSupervisor) -> Job:
    if name not in supervisor.jobs:
        raise HTTPException(status.HTTP_404_NOT_FOUND, f"there is no job named {name!r}")
    return supervisor.jobs[name]


TheJob = Annotated[Job, Depends(the_job)]


def _require(job: Job, state: str) -> None:
    if job.state != state:
        raise HTTPException(status.HTTP_409_CONFLICT, f"{job.name} is {job.state}, not {state}")


# For people and machines that watch


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE)


@router.get("/docs", include_in_schema=False)
async def documents(request: Request) -> HTMLResponse:
    """Return what /openapi.json says as a page that loads nothing."""
    rows = []
    for path, methods in request.app.openapi()["paths"].items():
        for method, about in methods.items():
            codes = ", ".join(about["responses"])
            cells = f"{method.upper()} {path}", about.get("description", about["summary"]), codes
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return HTMLResponse(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<title>API of the orchestrator</title>"
        "<style>:root{color-scheme:light dark}body{font:15px system-ui;margin:1.2rem}"
        "td,th{padding:.3rem .8rem;text-align:left;vertical-align:top}td:first-child{font-family:monospace}</style>"
        "<h1>API</h1><p>Changes need the header <code>Authorization: Bearer TOKEN</code>. "
        "The schema is at <a href=/openapi.json>/openapi.json</a>.</p>"
        f"<table><tr><th>request<th>what it does<th>answers</tr>{''.join(rows)}</table></html>"
    )


@router.get("/health")
async def health(supervisor: TheSupervisor) -> Health:
    """Say whether the service is up, and how its jobs are."""
    return Health(status="ok", jobs={job.name: job.state for job in supervisor.jobs.values()})


PLAIN: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


@router.get("/metrics", response_class=Response, responses=PLAIN)
async def metrics(supervisor: TheSupervisor) -> Response:
    """Return metrics in the format of Prometheus."""
    return Response(render(supervisor), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/events", response_class=StreamingResponse, responses=STREAM)
async def events(supervisor: TheSupervisor) -> StreamingResponse:
    """Stream everything that happens, after the state as it is now, as server-sent events."""
    return StreamingResponse(
        supervisor.feed.subscribe(supervisor.everything()),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store"},
    )


# Jobs


@router.get("/api/jobs")
async def jobs(supervisor: TheSupervisor) -> list[Status]:
    """Return all jobs with their last checkpoints."""
    return [job.status() for job in supervisor.jobs.values()]


@router.post("/api/jobs", status_code=status.HTTP_201_CREATED, dependencies=CHANGES, responses=refusals(401, 409))
async def start(new: NewJob, supervisor: TheSupervisor) -> Status:
    """Start a job; it goes on from its last checkpoint if there is one under its name."""
    try:
        return supervisor.start(JobSpec(**new.model_dump())).status()
    except ValueError as error:
        raise HTTPException(status.HTTP_409_CONFLICT, str(error)) from error


@router.get("/api/jobs/{name}", responses=refusals(404))
async def job(job: TheJob) -> Status:
    """Return one job."""
    return job.status()


@router.get("/api/jobs/{name}/losses", responses=refusals(404))
async def losses(job: TheJob) -> list[Loss]:
    """Return the loss of the last steps; null where it was infinite or not a number."""
    return [Loss(step=step, loss=loss) for step, loss in job.losses.items()]


@router.get("/api/jobs/{name}/scores", responses=refusals(404))
async def scores(job: TheJob) -> list[Score]:
    """Return what the evaluator found."""
    return list(job.scores)


ORDER: dict[str, Any] = {
    "status_code": status.HTTP_202_ACCEPTED,
    "dependencies": CHANGES,
    "responses": refusals(401, 404, 409),
}
"""How a job is told to do something: the answer comes before it is done."""


@router.post("/api/jobs/{name}/checkpoint", **ORDER)
async def checkpoint(job: TheJob, supervisor: TheSupervisor) -> Asked:
    """Ask for a checkpoint now."""
    _require(job, "running")
    return Asked(id=supervisor.checkpoint(job, "demand").id)


@router.post("/api/jobs/{name}/preempt", **ORDER)
async def preempt(job: TheJob, supervisor: TheSupervisor) -> Asked:
    """Have the job checkpoint and give its machine back, until it is resumed."""
    _require(job, "running")
    return Asked(id=supervisor.preempt(job).id)


@router.post("/api/jobs/{name}/resume", **ORDER)
async def resume(job: TheJob, supervisor: TheSupervisor) -> Status:
    """Start a preempted job again, from its last checkpoint."""
    _require(job, "preempted")
    supervisor.resume(job)
    return job.status()
