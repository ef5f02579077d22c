"""The result of the command verify for one checkpoint."""

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
        start: The first damaged byte of the file; None if the damage is not in some of its bytes.
        stop: One past the last damaged byte.
        tensors: Paths of the tensors and values that these bytes belong to.
        stored_in: Files of other checkpoints that have these bytes.
    """

    file: str
    reason: str
    start: int | None = None
    stop: int | None = None
    tensors: Sequence[str] = ()
    stored_in: Sequence[str] = ()


@dataclass(slots=True)
class Report:
    """The result for one checkpoint.

    Attributes:
        source: Where it is, as the user wrote it.
        kind: The program that has written it, or the kind of its files.
        files: How many files it has.
        nbytes: Their size together, in bytes.
        damage: All damage that was found.
        note: What could not be compared; None if every byte was compared.
    """

    source: str
    kind: str
    files: int = 0
    nbytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    note: str | None = None
