"""What aiostage uses where it is installed and does without until it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["EXTRAS", "needed_for"]

EXTRAS = {
    "fsspec": "fsspec",
    "obstore": "objects",
    "opentelemetry": "opentelemetry",
    "pytorch_lightning": "lightning",
    "tqdm": "progress",
    "transformers": "transformers",
}
"""Which extra of aiostage installs a package."""


@contextmanager
def needed_for(purpose: str) -> Iterator[None]:
    """Import optional packages in this block. The error for a missing one says what to install.

    Args:
        purpose: What needs them, as the beginning of a sentence.

    Raises:
        ModuleNotFoundError: If one is not installed, with the line that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            # Something that a package itself needs: it knows better what to say.
            raise
        raise ModuleNotFoundError(
            f"{purpose} needs the package {package}. Install it with: pip install 'aiostage[{EXTRAS[package]}]'",
            name=error.name,
            path=error.path,
        ) from error
