"""An asyncio service that owns training jobs: ``python examples/orchestrator`` and look at the page.

Each job is a process. The service asks them for checkpoints on a schedule, on demand and before preemption, follows
every checkpoint from staging to commit, restarts a dead job from its last commit, and has the weights of running
jobs scored by an evaluator that opens them in shared memory while the trainers go on.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import socket

import uvicorn
import uvloop
from feed import Feed
from service import create_app
from supervisor import JobSpec, Settings, Supervisor


class Server(uvicorn.Server):
    """Ends when it is told to, and leaves the end of the process to us: the jobs still have to be stopped."""

    def __init__(self, config: uvicorn.Config, feed: Feed) -> None:
        super().__init__(config)
        self._feed = feed

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        # Event streams first; otherwise it would wait for the watchers to leave.
        self._feed.close()
        await super().shutdown(sockets)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="orchestrator", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="loopback unless told otherwise (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free (%(default)s)")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name that clients may use for this machine"
    )
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


async def serve(arguments: argparse.Namespace, root: Path, token: str) -> None:
    """Run the service until a signal ends it.

    Raises:
        ExceptionGroup: If the supervision of the jobs fails.
    """
    settings = Settings(root=root, every=arguments.every, keep=arguments.keep)
    supervisor = Supervisor(settings, Feed())
    app = create_app(supervisor, token, hosts=arguments.allow_host)
    config = uvicorn.Config(app, host=arguments.host, port=arguments.port, lifespan="off", log_level="warning")
    # Before the jobs: where the port is taken nothing is started.
    listening = config.bind_socket()
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"The page: http://{host}:{listening.getsockname()[1]}/", flush=True)
    if "ORCHESTRATOR_TOKEN" not in os.environ:
        print(f"The token for its buttons, and for every request that changes something: {token}", flush=True)
    async with supervisor.running():
        for seed in range(arguments.jobs):
            supervisor.start(
                JobSpec(
                    name=f"job-{seed}", steps=arguments.steps, seed=seed, width=arguments.width, pace=arguments.pace
                )
            )
        await Server(config, supervisor.feed).serve([listening])


def main() -> None:
    arguments = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    token = os.environ.get("ORCHESTRATOR_TOKEN") or secrets.token_urlsafe(16)
    with ExitStack() as stack:
        root = arguments.root or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orchestrator-")))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(arguments, root, token))


if __name__ == "__main__":
    main()
