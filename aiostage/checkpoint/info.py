"""What was saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CheckpointInfo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What was saved.

    Attributes:
        location: Where it is: an absolute path, or a URL.
        nbytes: Size of the tensors, in bytes; memory that several leaves share counts once.
        leaves: How many tensors the tree has.
        written_bytes: Size of the files that were written, in bytes. If only what has changed was written, it may be
            far less than ``nbytes``.
        files: The names of all files, the manifest last.
        checksums: For each file the digest of its parts' digests, or of itself if it has one part only, for example
            ``"xxh3_64:0123456789abcdef"``.
        captured: Seconds from the call until the source could be changed again.
        committed: Seconds from the call until the checkpoint was complete and safe on the disk.
    """

    location: str
    nbytes: int
    leaves: int
    written_bytes: int
    files: tuple[str, ...]
    checksums: Mapping[str, str]
    captured: float
    committed: float

    @property
    def path(self) -> Path:
        """The directory, of a checkpoint on a local disk.

        Raises:
            ValueError: If it is elsewhere.
        """
        if "://" in self.location:
            raise ValueError(f"{self.location} is not on a local disk and has no path")
        return Path(self.location)
