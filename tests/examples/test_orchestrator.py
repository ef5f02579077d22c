"""The orchestrator end to end: real processes, real HTTP, a real browser."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.examples import browser
from tests.examples.running import ORCHESTRATOR, TOKEN, Service, orchestrator
from tests.patience import seconds
from tests.servers.process import free_ports
from tests.warm import PYTHON, imported

WARMED = Path(__file__).with_name("warmed.py")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module", autouse=True)
def _imported() -> Iterator[None]:
    """Let a worker begin in a moment: its imports take four seconds of a processor, and a dozen are started."""
    with imported("sklearn.datasets", "torch._dynamo"):
        yield


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with two jobs, job-0 and job-1, which every test leaves running."""
    with orchestrator(tmp_path_factory.mktemp("root"), WARMED, jobs=2, width=256, steps=100_000, every=1) as service:
        yield service


def committed(job: dict[str, Any], reason: str | None = None) -> list[dict[str, Any]]:
    return [c for c in job["checkpoints"] if c["stage"] == "committed" and reason in (None, c["reason"])]


def last_stage(service: Service, number: str) -> str:
    """Wait until a checkpoint has ended one way or another, and return how."""

    def ended(job: dict[str, Any]) -> list[str]:
        stages = [c["stage"] for c in job["checkpoints"] if c["id"] == number]
        return [stage for stage in stages if stage in ("committed", "failed", "lost", "skipped")]

    return ended(service.until(ended))[0]


def uninterrupted(steps: int, width: int) -> list[list[float]]:
    """Return the losses of an undisturbed run, from a process like the workers'."""
    program = (
        f"import json, sys, torch; torch.set_num_threads(1); sys.path.insert(0, {str(ORCHESTRATOR)!r})\n"
        "from training import Digits, Trainer\n"
        f"trainer = Trainer(Digits(), seed=0, width={width})\n"
        f"print(json.dumps([[step + 1, trainer.step()] for step in range({steps})]))\n"
    )
    outcome = subprocess.run([*PYTHON, "-c", program], capture_output=True, check=True)
    return json.loads(outcome.stdout)


def test_a_worker_killed_while_it_saves_resumes_with_the_losses_of_an_uninterrupted_run(tmp_path: Path) -> None:
    steps, width = 45, 1536
    with orchestrator(tmp_path, WARMED, jobs=1, width=width, steps=steps, every=0, pace=0.1) as service:
        kills = lost = 0
        # Twice, and more often only while every save has been faster than the signal.
        while kills < 2 or (not lost and kills < 8):
            service.until(lambda job, least=5 * (kills + 1): job["state"] == "running" and job["step"] >= least)
            service.post("/api/jobs/job-0/checkpoint")
            # From the moment that the worker has begun until it has committed: wherever that is, it dies.
            job = service.until(lambda job: job["checkpoints"][-1]["stage"] != "asked", every=0.002)
            time.sleep(0.02 * (kills == 1))
            os.kill(job["pid"], signal.SIGKILL)
            job = service.until(lambda job, pid=job["pid"]: job["state"] == "running" and job["pid"] != pid)
            lost += sum(c["stage"] == "lost" for c in job["checkpoints"])
            kills += 1
        assert lost, "at least one died before it had committed"
        job = service.until(lambda job: job["state"] == "finished")
        assert job["restarts"] == kills
        losses = service.get("/api/jobs/job-0/losses")
    assert [[point["step"], point["loss"]] for point in losses] == uninterrupted(steps, width)


def test_checkpoints_on_schedule_on_demand_and_before_preemption(service: Service) -> None:
    for name in ("job-0", "job-1"):
        job = service.until(lambda job: len(committed(job, "schedule")) >= 2 and job["score"], name)
        assert job["state"] == "running"
        assert 0 < job["score"]["step"] <= job["step"], "the evaluator has seen weights in shared memory"
    # One that falls on the step of a scheduled one is skipped: that has the same state.
    while (stage := last_stage(service, service.post("/api/jobs/job-0/checkpoint")["id"])) != "committed":
        assert stage == "skipped"
    assert committed(service.job("job-0"), "demand")
    service.post("/api/jobs/job-1/preempt")
    preempted = service.until(lambda job: job["state"] == "preempted" and job["pid"] is None, "job-1")
    last = preempted["checkpoints"][-1]
    assert last["reason"] == "preemption"
    assert [c for c in committed(preempted) if c["step"] == preempted["step"] == last["step"]]
    kept = sorted(path.name for path in (service.root / "job-1").iterdir())
    assert len(kept) == 3, "only the newest are kept"
    service.post("/api/jobs/job-1/resume")
    assert service.until(lambda job: job["step"] > preempted["step"], "job-1")["restarts"] == 0

    metrics = service.client.get("/metrics").text
    assert 'orchestrator_job_running{job="job-0"} 1.0' in metrics
    assert "orchestrator_checkpoints_total" in metrics
    assert 'orchestrator_job_loop_delay_seconds{job="job-0"}' in metrics
    assert "/api/jobs/{name}/preempt" in service.get("/openapi.json")["paths"]
    assert service.get("/health")["status"] == "ok"


def test_changes_need_the_token_and_a_job_that_can(service: Service) -> None:
    service.until(lambda job: job["state"] == "running")
    post = service.client.post
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
        for path in ("/api/jobs/job-0/checkpoint", "/api/jobs/job-0/preempt", "/api/jobs"):
            assert post(path, headers=headers, json={"name": "more"}).status_code == 401
    assert [job["name"] for job in service.get("/api/jobs")] == ["job-0", "job-1"]
    assert post("/api/jobs/nobody/checkpoint", headers=service.allowed).status_code == 404
    assert post("/api/jobs/job-0/resume", headers=service.allowed).status_code == 409
    assert post("/api/jobs", headers=service.allowed, json={"name": "job-0"}).status_code == 409
    assert post("/api/jobs", headers=service.allowed, json={"name": "../up"}).status_code == 422
    service.post("/api/jobs", {"name": "more", "width": 64, "steps": 5, "pace": 0})
    assert service.until(lambda job: job["state"] == "finished", "more")["step"] == 5


@pytest.mark.skipif(browser.MISSING is not None, reason=str(browser.MISSING))
def test_the_page_shows_it_all_live(service: Service, tmp_path: Path) -> None:
    screenshot = os.environ.get("ORCHESTRATOR_SCREENSHOT")
    with browser.browser(tmp_path / "profile", lambda: free_ports(1)[0]) as window:
        window.open(service.url)
        window.until("return document.getElementById('link').textContent === 'live'")
        for name in ("job-0", "job-1"):
            card = f"document.getElementById('job-card-{name}')"
            window.until(f"return {card} && {card}.innerText.includes('running')")
            window.until(f"return {card}.innerText.includes('committed')")
            window.until(f"return {card}.innerText.includes('evaluator: ')")
            assert window.until(f"return {card}.querySelector('.losses path').getAttribute('d').length") > 20
            assert window.until(f"return {card}.querySelectorAll('.losses text').length") >= 3, "numbers at the axis"
            assert window.until(f"return {card}.querySelectorAll('.scores circle').length") >= 1
            assert window.until(f"return {card}.querySelectorAll('.timeline rect').length") >= 2
            assert window.until(f"return {card}.querySelectorAll('.timeline circle').length") >= 2, "the loop's delay"
        step = "parseInt(document.getElementById('job-card-job-0').innerText.match(/step (\\d+) of/)[1])"
        before = window.run(f"return {step}")
        window.until(f"return {step} > {before}")
        # A button without the token is refused, in plain view.
        click = "document.querySelectorAll('#job-card-job-0 button')[1].click()"
        window.run(click)
        window.until("return document.getElementById('notice').innerText.includes('token')")
        window.run(
            "const field = document.getElementById('token'); field.value = arguments[0];"
            "field.dispatchEvent(new Event('input'))",
            TOKEN,
        )
        if screenshot:
            time.sleep(6)
            window.screenshot(Path(screenshot))
        window.resize(400, 900)
        assert window.run("return document.documentElement.scrollWidth <= window.innerWidth"), "it fits a phone"
        window.run(click)
        window.until("return document.getElementById('job-card-job-0').innerText.includes('preempted')")
        window.run("document.querySelectorAll('#job-card-job-0 button')[2].click()")
        window.until("return document.getElementById('job-card-job-0').innerText.includes('running')")
        assert service.job()["checkpoints"][-1]["reason"] in ("preemption", "schedule")
        # Why a checkpoint was lost is said where it is listed.
        os.kill(service.job()["pid"], signal.SIGKILL)
        window.until("return document.getElementById('job-card-job-0').innerText.includes('was killed by SIGKILL')")
        assert [line for line in window.log() if "401 (Unauthorized)" not in line] == []


def test_a_hundred_requests_a_second_while_four_workers_checkpoint(service: Service) -> None:
    rate, duration = 100, 2

    async def load(url: str) -> list[int]:
        async def one(client: httpx.AsyncClient, due: float) -> int:
            await asyncio.sleep(due)
            return (await client.get("/api/jobs")).status_code

        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=url, timeout=seconds(30), limits=limits, trust_env=False) as client:
            return await asyncio.gather(*(one(client, number / rate) for number in range(rate * duration)))

    for name in ("job-2", "job-3"):
        service.post("/api/jobs", {"name": name, "width": 768, "steps": 100_000, "pace": 0.25})
    names = [f"job-{number}" for number in range(4)]
    before = {}
    for name in names:
        before[name] = service.until(lambda job: committed(job), name)["checkpoints"][-1]["id"]
    begin = time.monotonic()
    statuses = asyncio.run(load(service.url))
    assert statuses == [200] * (rate * duration)
    assert time.monotonic() - begin < seconds(1.25 * duration), "far from keeping up"
    for name in names:
        service.until(lambda job, last=before[name]: int(committed(job)[-1]["id"]) > int(last), name)
