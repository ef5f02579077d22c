"""Measuring peers in turns in one process, or each in a fresh one."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from delays import LoopDelay, percentile
from peers import PEERS, Limit, Peer
from states import given_back, ready
from workloads import few_large, many_small

__all__ = ["WARM_UPS", "Samples", "cold", "cold_turns", "fails", "turns"]

WARM_UPS = 3
"""So many stagings of a structure compile its plan and make its guards."""

_PAUSE_SECONDS = 0.05

_TRIES = 3
"""How often a round in a fresh process is measured at most, until memory is in the state that is asked for."""

WORK: dict[str, Callable[[], Any]] = {"large": few_large, "small": many_small}


@dataclass
class Samples:
    """What one peer did: seconds of each round, and the delay of each tick of the loop's clock meanwhile.

    And seconds of processor time of each round, which other programs make no longer; none where a round is a process.
    And how often a round was measured again because memory was not in the state that was asked for, and how many
    rounds it never was.
    """

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    repeated: int = 0
    strayed: int = 0

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def ratio(self, other: Samples) -> float:
        """Median over the rounds of this peer's time by another's."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def text(self) -> str:
        """Median, least and most milliseconds, or why there are none."""
        if self.failure:
            return f"fails: {self.failure}"
        least, most = min(self.seconds), max(self.seconds)
        return f"{1e3 * self.median:.0f} ms ({1e3 * least:.0f}-{1e3 * most:.0f})"

    def as_json(self) -> dict[str, Any]:
        """Return what goes into a file."""
        return {
            "seconds": self.seconds,
            "processor": self.processor,
            "delay_p99": percentile(self.delays, 0.99),
            "delay_worst": max(self.delays, default=0.0),
            "timings": self.timings,
            "failure": self.failure,
            "repeated": self.repeated,
            "strayed": self.strayed,
        }


async def turns(
    peers: dict[str, Peer], make: Callable[[], Any], rounds: int, warm_ups: int = WARM_UPS
) -> dict[str, Samples]:
    """Let peers stage what ``make`` returns, in a new random order each round, and close them.

    Args:
        peers: By the name to report them under.
        make: Returns what to stage, once for each staging; not measured.
        rounds: How often each peer is measured.
        warm_ups: How often each stages before.
    """
    samples = {name: Samples() for name in peers}
    for peer in peers.values():
        for _ in range(warm_ups):
            await peer.stage(make())
    for _ in range(rounds):
        for name in random.sample(list(peers), len(peers)):
            await _measure(peers[name], make(), samples[name])
    for peer in peers.values():
        await peer.close()
    return samples


async def _measure(peer: Peer, tree: Any, samples: Samples) -> None:
    # What the peer before has left to be collected is its own, and its threads, which spin for a while in case there
    # is more to do, fall asleep.
    gc.collect()
    await asyncio.sleep(_PAUSE_SECONDS)
    if type(peer) is Limit:
        begin = perf_counter()
        await peer.stage(tree)
        samples.seconds.append(perf_counter() - begin)
        return
    delay = LoopDelay()
    async with delay:
        begin, used = perf_counter(), process_time()
        staged = await peer.stage(tree)
        samples.seconds.append(perf_counter() - begin)
        samples.processor.append(process_time() - used)
    # Dropping it is the user's own affair, and the same for every peer.
    del staged
    samples.delays += delay.delays
    samples.timings = vars(getattr(peer, "timings", None) or Samples()) if hasattr(peer, "timings") else {}


async def cold_turns(names: list[str], work: str, rounds: int, *options: str) -> dict[str, Samples]:
    """Measure the first staging in a process, in a fresh one each time.

    Args:
        names: Of peers.
        work: A key of WORK.
        rounds: How often each.
        *options: ``shared``; ``ready`` or ``given-back``: the state of free memory (:mod:`states`). A staging whose
            state was another one is measured again, whoever's it is and whatever it took, and counted.
    """
    samples = {name: Samples() for name in names}
    for _ in range(rounds):
        for name in random.sample(names, len(names)):
            await _fresh(name, work, samples[name], options)
    return samples


async def fails(name: str, work: str, *options: str) -> Samples:
    """Measure a peer that may fail; its error is then the result."""
    samples = Samples()
    await _fresh(name, work, samples, options)
    return samples


async def _fresh(name: str, work: str, samples: Samples, options: tuple[str, ...]) -> None:
    script = Path(__file__).with_name("staging.py")
    uvloop = ["--uvloop"] if type(asyncio.get_running_loop()).__module__ == "uvloop" else []
    for left in reversed(range(_TRIES)):
        process = await asyncio.create_subprocess_exec(
            sys.executable, script, "--cold", name, work, *options, *uvloop, stdout=-1, stderr=-1
        )
        output, errors = await process.communicate()
        if process.returncode:
            samples.failure = errors.decode().strip().splitlines()[-1][:120]
            return
        answer = json.loads(output.splitlines()[-1])
        if answer["found"] or not left:
            break
        samples.repeated += 1
    samples.strayed += not answer["found"]
    samples.seconds.append(answer["seconds"])
    samples.delays += answer["delays"]
    samples.timings = answer["timings"]


async def cold(name: str, work: str, options: list[str]) -> None:
    """Stage once, in a process that does nothing else, and print what it took."""
    tree = WORK[work]()
    peer = PEERS[name](use_shared_memory=True) if "shared" in options else PEERS[name]()
    samples = Samples()
    with ExitStack() as stack:
        state = None
        if "ready" in options:
            state = stack.enter_context(ready(sum(tensor.nbytes for tensor in tree.values())))
        elif "given-back" in options:
            state = stack.enter_context(given_back())
        await _measure(peer, tree, samples)
    answer = {"seconds": samples.seconds[0], "delays": samples.delays, "timings": samples.timings}
    print(json.dumps(answer | {"found": state is None or state.found}))
    await peer.close()
