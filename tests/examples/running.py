"""A running orchestrator, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.patience import seconds
from tests.servers.process import free_ports

__all__ = ["ORCHESTRATOR", "ROOT", "TOKEN", "Service", "orchestrator"]

ROOT = Path(__file__).parent.parent.parent
ORCHESTRATOR = ROOT / "examples" / "orchestrator"
TOKEN = "only-for-tests"
SOON = seconds(40.0)
"""Seconds in which whatever is waited for has happened, on a machine that has other things to do."""


class Service:
    """A running orchestrator."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, root: Path) -> None:
        self.process = process
        self.root = root
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=seconds(30), trust_env=False)
        self.allowed = {"Authorization": f"Bearer {TOKEN}"}

    def get(self, path: str) -> Any:
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any = None) -> Any:
        answer = self.client.post(path, headers=self.allowed, json=body)
        assert answer.status_code in (201, 202), answer.text
        return answer.json()

    def job(self, name: str = "job-0") -> dict[str, Any]:
        return self.get(f"/api/jobs/{name}")

    def until(
        self, condition: Callable[[dict[str, Any]], Any], name: str = "job-0", every: float = 0.05
    ) -> dict[str, Any]:
        """Wait until a job is as it should be, looking every so many seconds, and return it."""
        deadline = time.monotonic() + SOON
        while not condition(job := self.job(name)):
            assert self.process.poll() is None, "the service has ended"
            assert time.monotonic() < deadline, f"never came about: {job}"
            time.sleep(every)
        return job

    def end(self) -> None:
        """End it as a service manager would, and see that it takes everything with it."""
        workers = [job["pid"] for job in self.get("/api/jobs") if job["pid"]]
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(seconds(60)) in (0, -signal.SIGTERM)
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()], "workers outlive the service"


@contextmanager
def orchestrator(root: Path, program: Path = ORCHESTRATOR, *flags: str, **options: Any) -> Iterator[Service]:
    """Run a service; at the end of the block it has to end well, unless it has ended already."""
    (port,) = free_ports(1)
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, str(program), *flags, "--port", str(port), "--root", str(root), *words],
        env=os.environ | {"ORCHESTRATOR_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)},
        process_group=0,
    )
    service = Service(process, port, root)
    try:
        deadline = time.monotonic() + SOON
        while True:
            try:
                service.get("/health")
                break
            except httpx.TransportError:
                assert process.poll() is None, "the service does not start"
                assert time.monotonic() < deadline, "the service does not answer"
                time.sleep(0.1)
        yield service
        if process.poll() is None:
            service.end()
    finally:
        service.client.close()
        if process.poll() is None:
            process.kill()
            process.wait()
