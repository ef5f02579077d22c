"""What the command verify finds out about one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Damage", "Report"]


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as it was written.

    Attributes:
        file: Name of the file.
        reason: What is wrong with it.
        start: First byte in the file; None if it is not about some bytes.
        stop: One past the last byte.
        tensors: Places of the tensors, or values, that these bytes are part of.
        stored_in: Files of other checkpoints that the bytes lie in.
    """

    file: str
    reason: str
    start: int | None = None
    stop: int | None = None
    tensors: Sequence[str] = ()
    stored_in: Sequence[str] = ()


@dataclass(slots=True)
class Report:
    """What was found out about one checkpoint.

    Attributes:
        source: Where it is, as the user wrote it.
        kind: Which program has written it, or what its files are.
        files: How many it has.
        nbytes: How long they are together.
        damage: All that is wrong.
        note: What could not be compared, or None if every byte was.
    """

    source: str
    kind: str
    files: int = 0
    nbytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    note: str | None = None
