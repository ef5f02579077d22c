"""How much staging slows a training step that moves data over the same bus. Simulated, on a virtual clock: no device.

    python benchmarks/interference.py

The step offloads what each layer's forward pass leaves to the host and fetches it again for the backward pass, two
layers at a time. The optimizer waits on the device for the copies of the staging, as ``Snapshot.order_before`` has it.
Copies go out by the rules of ``StagingOptions.max_bytes_in_flight`` and ``low_priority_copies``, played here and not
by a stager. Everything that is moved, in either direction, shares one bus. The figures are those of this model, the
same on every machine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

from aiostage.testing import SimulatedAccelerator, SimulatedEvent, SimulatedStream, VirtualClock

MIB = 2**20
BUS = 50e9
"""Bytes a second. One copy alone can use all of it."""
LAYERS, FORWARD_SECONDS, BACKWARD_SECONDS, OPTIMIZER_SECONDS = 32, 0.004, 0.008, 0.010
STAGED_BYTES, COPY_BYTES = 8192 * MIB, 32 * MIB
REACTION_SECONDS = 100e-6
"""From the end of a copy to the launch of the next, where there is a limit."""

STEPS = {"no offloading": 0, "half of the bus": 144 * MIB, "nearly all of the bus": 272 * MIB}
"""Bytes that each layer moves, there and back."""
LIMITS = {"no limit": None, "1 GiB": 1024 * MIB, "256 MiB": 256 * MIB, "two copies": 0}


@dataclass(frozen=True)
class Outcome:
    """Seconds from the beginning of a step until its optimizer is done, and until everything is staged."""

    step: float
    staged: float


def move(accelerator: SimulatedAccelerator, nbytes: int, stream: SimulatedStream) -> None:
    """Enqueue something that moves bytes over the bus."""
    accelerator.launch(lambda: None, seconds=nbytes / BUS, moved_bytes=nbytes, stream=stream)


def enqueue_passes(accelerator: SimulatedAccelerator, nbytes: int) -> SimulatedStream:
    """Enqueue forward and backward, and return their stream."""
    device = accelerator.devices[0]
    compute = accelerator.current_stream(device)
    offload, fetch = (accelerator.side_stream(device, low_priority=False) for _ in range(2))
    offloaded: list[SimulatedEvent] = []
    for layer in range(LAYERS):
        if layer >= 2:
            compute.wait_event(offloaded[layer - 2])
        accelerator.launch(lambda: None, seconds=FORWARD_SECONDS, stream=compute)
        offload.wait_event(compute.record_event())
        move(accelerator, nbytes, offload)
        offloaded.append(offload.record_event())
    fetch.wait_event(compute.record_event())
    computed: list[SimulatedEvent] = []
    for layer in range(LAYERS):
        fetch.wait_event(offloaded[LAYERS - 1 - layer])
        if layer >= 2:
            fetch.wait_event(computed[layer - 2])
        move(accelerator, nbytes, fetch)
        compute.wait_event(fetch.record_event())
        accelerator.launch(lambda: None, seconds=BACKWARD_SECONDS, stream=compute)
        computed.append(compute.record_event())
    return compute


def play(nbytes: int, *, stages: bool, limit: int | None = None, low_priority: bool = True) -> Outcome:
    """Play one step, which stages or not."""
    clock = VirtualClock()
    with SimulatedAccelerator(clock=clock, bandwidth=BUS, bus_bandwidth=BUS) as accelerator:
        copying = accelerator.side_stream(accelerator.devices[0], low_priority=low_priority)
        copies = STAGED_BYTES // COPY_BYTES if stages else 0
        in_round = copies if limit is None else max(1, limit // 2 // COPY_BYTES)
        landed: list[SimulatedEvent] = []

        def launch_round() -> None:
            nonlocal copies
            for _ in range(min(in_round, copies)):
                move(accelerator, COPY_BYTES, copying)
                copies -= 1
            landed.append(copying.record_event())

        launch_round()
        compute = enqueue_passes(accelerator, nbytes)
        while copies:
            launch_round()
            while not landed[-2].completed:
                accelerator.step()
            clock.advance(REACTION_SECONDS)
        compute.wait_event(landed[-1])
        accelerator.launch(lambda: None, seconds=OPTIMIZER_SECONDS, stream=compute)
        done = compute.record_event()
        accelerator.synchronize()
        assert done.completed_at is not None
        assert landed[-1].completed_at is not None
        return Outcome(done.completed_at, landed[-1].completed_at if stages else 0.0)


def measure() -> dict[str, dict[str, Outcome]]:
    """Play every step in every way."""
    outcomes: dict[str, dict[str, Outcome]] = {}
    for name, nbytes in STEPS.items():
        rows = outcomes[name] = {"no staging": play(nbytes, stages=False)}
        for limited, limit in LIMITS.items():
            for priority, low in (("low priority", True), ("same priority", False)):
                rows[f"{limited}, {priority}"] = play(nbytes, stages=True, limit=limit, low_priority=low)
    return outcomes


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", action="store_true", help="print JSON")
    outcomes = measure()
    if parser.parse_args().json:
        print(json.dumps({name: {row: vars(it) for row, it in rows.items()} for name, rows in outcomes.items()}))
        return
    print("| staging | " + " | ".join(f"{name}: step | staged" for name in outcomes) + " |")
    print("| --- |" + " --- | --- |" * len(outcomes))
    for row in next(iter(outcomes.values())):
        cells = []
        for rows in outcomes.values():
            alone, outcome = rows["no staging"], rows[row]
            slower = f" (+{outcome.step / alone.step - 1:.0%})" if outcome is not alone else ""
            staged = f"{outcome.staged * 1e3:.0f} ms" if outcome.staged else ""
            cells.append(f"{outcome.step * 1e3:.0f} ms{slower} | {staged}")
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
