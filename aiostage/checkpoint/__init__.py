"""Checkpoints: written, read, and kept for a run. Here is what goes beyond :mod:`aiostage` itself.

Read it in this order. A save: `save`, then `writer`, which plans what goes into which file and sends it, and
`window_parts` for a copy that is larger than its budget. A load: `load`, then `loading`, which leads, `reader`, which
reads headers and decides what to read, `part_reader`, which reads and verifies parts, and `targets`, where elements go;
with a live tree also `into`, `live_values` and `transfer`, with patterns `selection`. A run: `checkpointer` on top of
`background`, `save_task` for one of its saves, `index` for what there is, `preemption` for signals. `progress` is for
all of them. `foreign` and `foreign_dcp` read the checkpoints of other programs, `verify` reads without loading.
"""

from aiostage.checkpoint.save import convert
from aiostage.format.classes import PlainObject
from aiostage.format.registry import register

__all__ = ["PlainObject", "convert", "register"]
