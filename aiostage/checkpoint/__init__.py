"""Checkpoints: written, read, and kept for a run. Here is what goes beyond :mod:`aiostage` itself.

How the room is read. A save: `save`, then `writer`, which plans what goes into which file and sends it. A load: `load`,
then `opening`, which tells a deleted checkpoint from a damaged one, `reader`, which reads headers and decides what to
read, `part_reader`, which reads and verifies parts, and `targets`, where elements go; with a live tree also `into`,
with patterns `selection`. The run: `checkpointer`, `save_task` for one of its saves, `index` for what there is,
`preemption` for signals. `foreign` and `foreign_dcp` read the checkpoints of other programs, `verify` reads without
loading.
"""

from aiostage.checkpoint.save import convert
from aiostage.format.classes import PlainObject
from aiostage.format.registry import register

__all__ = ["PlainObject", "convert", "register"]
