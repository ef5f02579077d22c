"""A child of the orchestrator without PyTorch, whose seed says how it behaves. Without arguments: the evaluator."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from typing import Any

WELL, PRINTS, DIVERGES = range(3)
FAULTS = {
    3: b"a stray line\n",
    4: b'{"event": "what"}\n',
    5: b'{"event": "step", "step": "one", "loss": 1.0}\n',
    6: b'{"event": "checkpoint", "id": "1", "stage": "committed", "at": NaN}\n',
    7: b"[" * 100_000 + b"\n",
    8: b"x" * (2 << 20),
    9: b'{"event": "started", "step": 1e400}\n',
}
RAISES = 10
GARBAGE = b"\xff\xfe no line ends here " * 1000

channel: socket.socket


def tell(event: str, **values: Any) -> None:
    channel.sendall(json.dumps({"event": event, **values}).encode() + b"\n")


def evaluate() -> None:
    """Score once, also a job that there is not, and then say what is no event."""
    tell("ready")
    for line in channel.makefile("rb"):
        command = json.loads(line)
        tell("opened", job=command["job"], step=command["step"])
        tell("score", job="nobody", step=1, loss=0.5, accuracy=0.5)
        tell("score", job=command["job"], step=command["step"], loss=float("inf"), accuracy=0.5)
        channel.sendall(b"done\n")


def work(seed: int) -> None:
    tell("started", step=0)
    step = 0
    said = b""
    while True:
        step += 1
        tell("step", step=step, loss=float("nan") if seed == DIVERGES else 1 / step)
        tell("delay", at=time.time(), worst=0.001)
        if seed == PRINTS:
            print('{"event": "finished", "step": 1}', file=sys.stderr if step % 2 else sys.stdout, flush=True)
            os.write(sys.stdout.fileno(), GARBAGE if step == 1 else b"\xff")
        if seed in FAULTS:
            channel.sendall(FAULTS[seed])
            time.sleep(60)
        if seed == RAISES and step == 3:
            tell("checkpoint", id="9", stage="staging", reason="mine", step=step, at=time.time())
            raise ArithmeticError("out of luck")
        if not select.select([channel], [], [], 0.02)[0]:
            continue
        said += channel.recv(1 << 16) or sys.exit(0)
        *commands, said = said.split(b"\n")
        for command in map(json.loads, commands):
            if command["do"] == "release":
                continue
            for stage in ("staging", "captured", "committed"):
                tell("checkpoint", id=command["id"], stage=stage, step=step, at=time.time())
            tell("weights", step=step, handle="")
            if command["do"] == "preempt":
                tell("preempted", step=step)
                return


if __name__ == "__main__":
    channel = socket.socket(fileno=int(os.environ["ORCHESTRATOR_CHANNEL"]))
    if len(sys.argv) == 1:
        evaluate()
    else:
        work(int(sys.argv[sys.argv.index("--seed") + 1]))
