"""For tests of aiostage and of programs that use it: a simulated accelerator, a clock, probes, suites.

Read in this order. `simulator` is the accelerator that tests use, `backend` the part of it that staging uses.
`scheduler` decides which enqueued operation comes next; `streams`, `bus` and `device_memory` are the parts of a device;
`clock` is time that a test moves. `probes` watch the event loop and find what is left open. `cancelling` cancels a
coroutine at each of its awaits. `stager_suite` and `storage_suite` are tests for implementations of your own. `simgpu`
is something else: a device for PyTorch itself, in C++.
"""

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
