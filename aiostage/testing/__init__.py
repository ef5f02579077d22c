"""For tests of aiostage and of what is built on it: an accelerator that needs no hardware, and a clock to run it on."""

from aiostage.testing.clock import Timeline, VirtualClock
from aiostage.testing.simulator import (
    SimulatedAccelerator,
    SimulatedDeviceError,
    SimulatedEvent,
    SimulatedHazardError,
    SimulatedStatistics,
    SimulatedStream,
)

__all__ = [
    "SimulatedAccelerator",
    "SimulatedDeviceError",
    "SimulatedEvent",
    "SimulatedHazardError",
    "SimulatedStatistics",
    "SimulatedStream",
    "Timeline",
    "VirtualClock",
]
