"""The orchestrator's supervision and its HTTP side, with children that behave as they should not."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.examples.child import DIVERGES, FAULTS, PRINTS, RAISES
from tests.examples.running import TOKEN, Service, orchestrator
from tests.patience import seconds

SERVING = Path(__file__).parent / "serving.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def gone(pids: list[int]) -> bool:
    """Return whether processes have gone; one that was killed goes when init has waited for it."""
    deadline = time.monotonic() + seconds(10)
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a job, job-0, that every test leaves running."""
    with orchestrator(tmp_path_factory.mktemp("root"), SERVING, jobs=1, every=0.3) as service:
        yield service


def start(service: Service, name: str, seed: int) -> None:
    service.post("/api/jobs", {"name": name, "seed": seed})


def test_what_a_worker_prints_is_no_message(service: Service) -> None:
    start(service, "prints", PRINTS)
    job = service.until(lambda job: job["step"] > 20, "prints")
    assert job["state"] == "running"
    assert job["restarts"] == 0


def test_a_worker_that_says_what_is_no_event_fails_alone(service: Service) -> None:
    for seed in FAULTS:
        start(service, f"fault-{seed}", seed)
    before = service.job()
    for seed in FAULTS:
        job = service.until(lambda job: job["state"] == "failed", f"fault-{seed}")
        assert job["restarts"] == 1
        assert "sent what is no event: " in job["died_of"]
    assert service.until(lambda job: job["step"] > before["step"] + 5)["pid"] == before["pid"]


def test_a_lost_checkpoint_says_what_the_worker_died_of(service: Service) -> None:
    start(service, "raises", RAISES)
    job = service.until(lambda job: job["state"] == "failed", "raises")
    lost = [c for c in job["checkpoints"] if c["reason"] == "mine"][-1]
    assert lost["stage"] == "lost"
    assert lost["error"].endswith(" ended with status 1: ArithmeticError: out of luck")


def test_checkpoints_are_numbered_by_job(service: Service) -> None:
    numbers = [int(c["id"]) for c in service.until(lambda job: len(job["checkpoints"]) > 2)["checkpoints"]]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    start(service, "other", 0)
    assert service.until(lambda job: job["checkpoints"], "other")["checkpoints"][0]["id"] == "1"


def test_the_evaluator_is_started_again_after_it_has_said_what_is_no_event(service: Service) -> None:
    service.until(lambda job: len(service.get("/api/jobs/job-0/scores")) > 2)
    scores = service.get("/api/jobs/job-0/scores")
    assert scores[0] == {"step": scores[0]["step"], "loss": None, "accuracy": 0.5}


def test_a_loss_that_is_not_a_number_is_null(service: Service) -> None:
    start(service, "diverges", DIVERGES)
    service.until(lambda job: job["step"] > 1, "diverges")
    assert service.get("/api/jobs/diverges/losses")[0] == {"step": 1, "loss": None}
    with service.client.stream("GET", "/events") as stream:
        lines = stream.iter_lines()
        kind, data = next(lines), next(lines).removeprefix("data: ")
    assert kind == "event: state"
    state = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (diverging,) = (job for job in state["jobs"] if job["name"] == "diverges")
    assert diverging["losses"][0] == [1, None]
    assert diverging["delays"][0][1] == 0.001


def test_a_fault_of_the_supervision_ends_the_process(tmp_path: Path) -> None:
    wanted = tmp_path / "wanted"
    with orchestrator(tmp_path / "root", SERVING, "--broken", str(wanted), jobs=2, every=0) as service:
        pids = [service.until(lambda job: job["step"] > 0, f"job-{number}")["pid"] for number in range(2)]
        wanted.touch()
        assert service.process.wait(seconds(30)) == 1
        assert gone(pids)


def test_workers_end_when_the_service_is_killed(tmp_path: Path) -> None:
    with orchestrator(tmp_path, SERVING, jobs=3, every=0) as service:
        pids = [service.until(lambda job: job["step"] > 0, f"job-{number}")["pid"] for number in range(3)]
        service.process.kill()
        service.process.wait()
        deadline = time.monotonic() + seconds(10)
        while any(Path(f"/proc/{pid}/fd/0").exists() for pid in pids):
            assert time.monotonic() < deadline, "they live on"
            time.sleep(0.05)


def test_an_interrupt_of_the_terminal_has_the_jobs_save_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with orchestrator(tmp_path, SERVING, jobs=2, every=0) as service:
        for name in ("job-0", "job-1"):
            service.until(lambda job: job["step"] > 0, name)
        # As Ctrl-C does: it goes to the whole group.
        os.killpg(service.process.pid, signal.SIGINT)
        assert service.process.wait(seconds(60)) == 0
    said = capfd.readouterr().err
    assert "job-0 is preempted" in said
    assert "job-1 is preempted" in said
    assert "killed by" not in said


def test_a_watcher_that_leaves_is_forgotten(service: Service) -> None:
    for _ in range(3):
        with service.client.stream("GET", "/events") as stream:
            next(stream.iter_lines())
    deadline = time.monotonic() + seconds(10)
    while "orchestrator_watchers 0.0" not in service.client.get("/metrics").text:
        assert time.monotonic() < deadline, "it is still counted"
        time.sleep(0.05)


def ask(service: Service, *headers: tuple[str, str], method: str = "POST", body: bytes = b"") -> int:
    """Send just these headers and bytes to /api/jobs, and return the status of the answer."""
    address = httpx.URL(service.url)
    connection = http.client.HTTPConnection(address.host, address.port, timeout=seconds(10))
    try:
        connection.putrequest(method, "/api/jobs", skip_host=any(name == "Host" for name, _ in headers))
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders(body)
        with connection.getresponse() as answer:
            return answer.status
    finally:
        connection.close()


WITH_TOKEN = ("Authorization", f"Bearer {TOKEN}")


def test_the_token_is_checked_before_the_body_is_sent(service: Service) -> None:
    assert ask(service, ("Content-Length", "1000")) == 401
    assert ask(service, ("Content-Length", "9" * 12)) == 401
    assert ask(service, WITH_TOKEN, WITH_TOKEN, ("Content-Length", "2")) == 401


def test_bodies_are_bounded(service: Service) -> None:
    assert ask(service, WITH_TOKEN, ("Content-Length", str((1 << 20) + 1))) == 413
    assert ask(service, ("Content-Length", str(1 << 40)), method="GET") == 413
    chunk = b"%x\r\n" % (1 << 19) + b" " * (1 << 19) + b"\r\n"
    assert ask(service, WITH_TOKEN, ("Transfer-Encoding", "chunked"), body=chunk * 3) == 413
    assert ask(service, WITH_TOKEN, ("Transfer-Encoding", "chunked"), body=chunk + b"0\r\n\r\n") == 422


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("10.0.0.7:8000", 200),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("127.0.0.1.nip.example", 400),
        ("localhost@evil.example", 400),
        ("[evil", 400),
        ("", 400),
    ],
)
def test_names_of_other_sites_are_refused(service: Service, host: str, status: int) -> None:
    assert ask(service, ("Host", host), method="GET") == status


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "a", "pace": NaN}',
        '{"name": "a", "pace": Infinity}',
        '{"name": "a", "pace": 1e999}',
        '{"name": "\\ud800"}',
        '{"\\ud800": 1}',
        '{"name": "a", "steps": 1e300}',
        '{"name": "a", "seed": 9007199254740992}',
        '{"name": "a", "steps": true}',
        '{"name": "a\\n"}',
        "[]",
        "null",
    ],
)
def test_what_is_no_job_is_refused(service: Service, body: str) -> None:
    headers = service.allowed | {"Content-Type": "application/json"}
    answer = service.client.post("/api/jobs", headers=headers, content=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"]


@pytest.mark.parametrize("body", ["{", "[" * 100_000, '{"name": "a", "steps": ' + "9" * 5000 + "}", b"\xff"])
def test_what_is_no_json_is_refused(service: Service, body: str | bytes) -> None:
    headers = service.allowed | {"Content-Type": "application/json"}
    answer = service.client.post("/api/jobs", headers=headers, content=body)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["detail"]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_from_other_sites(service: Service, path: str) -> None:
    answer = service.client.get(path)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; connect-src 'self'; ")
    text = answer.text.replace("http://www.w3.org/2000/svg", "")  # the name of a namespace
    assert "://" not in text
    assert 'src="//' not in text


def test_all_requests_fit_the_documents(service: Service) -> None:
    """Requests that the OpenAPI documents allow or forbid, and answers that they foresee."""
    schemathesis = pytest.importorskip("schemathesis")
    positive, negative = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    schema.validate()
    assert schema.raw_schema["openapi"].startswith("3.1")
    responses = schema.raw_schema["paths"]["/api/jobs/{name}/preempt"]["post"]["responses"]
    assert {"202", "401", "404", "409", "413", "422"} <= responses.keys()
    answered = set()
    # The stream of events never ends.
    for operation in [found.ok() for found in schema.exclude(path="/events").get_all_operations()]:
        # A request without a body has nothing to vary but the name.
        named = {"path_parameters": {"name": "job-0"}} if operation.path_parameters else {}
        ways = [(positive, named, 6 if operation.body else 1)]
        if operation.body or operation.label == "GET /api/jobs/{name}":
            ways += [(negative, {}, 6), (positive, {}, 2)]
        for mode, given_values, examples in ways:

            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=HealthCheck,
            )
            @given(case=operation.as_strategy(mode, **given_values))
            def check(case: Any) -> None:
                answer = case.call(headers=service.allowed)
                case.validate_response(answer)
                answered.add(answer.status_code)

            check()
    assert {200, 201, 202, 404, 409, 422} <= answered
