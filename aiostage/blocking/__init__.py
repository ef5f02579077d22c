"""aiostage for programs without an event loop: the same classes and functions, whose calls block until they are done.

Read `background` first: an event loop in a thread, to which every blocking call hands a coroutine. Public functions of
aiostage record the caller's streams when they are called. Therefore the modules here call them in the caller's thread,
and only run the coroutine in the background.
"""

from aiostage.blocking.checkpointer import Checkpointer, SaveHandle
from aiostage.blocking.files import load, save
from aiostage.blocking.stager import Snapshot, Stager
from aiostage.blocking.weights import WeightPublisher, WeightSubscriber

__all__ = [
    "Checkpointer",
    "SaveHandle",
    "Snapshot",
    "Stager",
    "WeightPublisher",
    "WeightSubscriber",
    "load",
    "save",
]
