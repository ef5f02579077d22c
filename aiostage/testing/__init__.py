"""For tests of aiostage and of what is built on it: a simulated accelerator, a clock, probes, suites."""

from aiostage.testing.cancelling import at_every_await
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
from aiostage.testing.suites import StagerSuite

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
    "StagerSuite",
    "Timeline",
    "VirtualClock",
    "at_every_await",
]
