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
from aiostage.testing.stager_suite import StagerSuite
from aiostage.testing.storage_suite import StorageSuite

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
    "StorageSuite",
    "Timeline",
    "VirtualClock",
    "at_every_await",
]
