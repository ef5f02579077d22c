"""What the checkpoints of a run are called in its storage, as docs/checkpointer.md says, and not as the code does."""

from __future__ import annotations

__all__ = ["name_of", "tombstone_of"]


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08}"


def tombstone_of(name: str) -> str:
    """Return what lies beside a checkpoint that was removed and of which others still need files."""
    return f"{name}.removed"
