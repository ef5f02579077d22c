"""An asyncio service that owns training jobs: ``python examples/orchestrator`` and look at the page.

Each job is a process. The service asks them for checkpoints on a schedule, on demand and before preemption, follows
every checkpoint from staging to commit, restarts a dead job from its last commit, and has the weights of running
jobs scored by an evaluator that opens them in shared memory while the trainers go on.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import tempfile
from contextlib import ExitStack
from pathlib import Path
from socket import socket

import uvicorn
from fastapi import FastAPI
from service import create_app
from supervisor import JobSpec, Settings


class Server(uvicorn.Server):
    """Ends event streams first when it is told to end; otherwise it would wait for the watchers to leave."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self._app.state.supervisor.feed.close()
        await super().shutdown(sockets)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="orchestrator", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="loopback unless told otherwise (%(default)s)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--root", type=Path, help="where checkpoints lie; a temporary directory unless given")
    parser.add_argument("--jobs", type=int, default=2, help="how many jobs to start with (%(default)s)")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--pace", type=float, default=0.02, help="seconds that a step takes at least (%(default)s)")
    parser.add_argument(
        "--every", type=float, default=5.0, help="seconds between checkpoints, 0 for none (%(default)s)"
    )
    parser.add_argument("--keep", type=int, default=3, help="checkpoints kept of each job (%(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    token = os.environ.get("ORCHESTRATOR_TOKEN") or secrets.token_urlsafe(16)
    with ExitStack() as stack:
        root = arguments.root or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orchestrator-")))
        settings = Settings(root=root, every=arguments.every, keep=arguments.keep)
        jobs = [
            JobSpec(name=f"job-{seed}", steps=arguments.steps, seed=seed, width=arguments.width, pace=arguments.pace)
            for seed in range(arguments.jobs)
        ]
        print(f"The page: http://{arguments.host}:{arguments.port}/", flush=True)
        if "ORCHESTRATOR_TOKEN" not in os.environ:
            print(f"The token for its buttons, and for whatever changes something: {token}", flush=True)
        app = create_app(settings, jobs, token)
        config = uvicorn.Config(app, host=arguments.host, port=arguments.port, loop="uvloop", log_level="warning")
        Server(config, app).run()


if __name__ == "__main__":
    main()
