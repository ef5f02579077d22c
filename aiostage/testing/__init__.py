"""For tests of aiostage and of what is built on it: a simulated accelerator, a clock to run it on, and probes."""

from aiostage.testing.clock import Timeline, VirtualClock
from aiostage.testing.probes import LeakProbe, Leftovers, LoopHold, LoopProbe
from aiostage.testing.simulator import (
    SimulatedAccelerator,
    SimulatedDeviceError,
    SimulatedEvent,
    SimulatedHazardError,
    SimulatedStatistics,
    SimulatedStream,
)

__all__ = [
    "LeakProbe",
    "Leftovers",
    "LoopHold",
    "LoopProbe",
    "SimulatedAccelerator",
    "SimulatedDeviceError",
    "SimulatedEvent",
    "SimulatedHazardError",
    "SimulatedStatistics",
    "SimulatedStream",
    "Timeline",
    "VirtualClock",
]
