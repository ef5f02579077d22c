"""What DCP pickles, read without running what a pickle names."""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.metadata import Metadata

from aiostage import _private
from aiostage.errors import CheckpointError, said

__all__ = ["read_metadata", "read_value"]

_METADATA = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
_OTHERS: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("pathlib", "PosixPath"): pathlib.PurePath,
    ("pathlib", "WindowsPath"): pathlib.PurePath,
    ("pathlib", "PurePath"): pathlib.PurePath,
}

_allowing = Lock()
"""PyTorch's list of safe classes is that of the process: of two contexts in two threads, one would end the other."""


class _Unpickler(pickle.Unpickler):
    """Makes DCP's metadata, and nothing else."""

    def __init__(self, data: Any, own: dict[tuple[str, str], type]) -> None:
        super().__init__(io.BytesIO(data))
        self._own = own

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that is on the list."""
        if module == torch_metadata.__name__ and name in _METADATA:
            return getattr(torch_metadata, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _private.require("get_layout")
        found = _OTHERS.get((module, name)) or self._own.get((module, name))
        if found is None and module == "torch":
            found = vars(torch).get(name)
            found = found if isinstance(found, (torch.dtype, torch.memory_format)) else None
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}"[:200])
        return found


def read_metadata(data: Any, records: type) -> Metadata:
    """Unpickle the metadata of a checkpoint.

    Args:
        data: Its bytes.
        records: The class of the places of its items.

    Raises:
        Exception: If it is damaged, or names anything else.
    """
    metadata: Metadata = _Unpickler(data, {(records.__module__, records.__qualname__): records}).load()
    return metadata


def read_value(file: io.BytesIO, *, weights_only: bool) -> Any:
    """Unpickle a value that is no tensor.

    Args:
        file: The bytes.
        weights_only: As for ``torch.load``, but that arrays and numbers of NumPy are taken too.

    Raises:
        CheckpointError: If it needs code that may not be run.
    """
    if not weights_only:
        return torch.load(file, weights_only=False)
    with _allowing, torch.serialization.safe_globals(_numpy()):
        try:
            return torch.load(file, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"a value in it is no plain data, and weights_only=True refuses it: {said(error)}.",
                remedy="If you trust the checkpoint, pass weights_only=False; or pass its classes to "
                "torch.serialization.add_safe_globals() first.",
            ) from error


def _numpy() -> list[Any]:
    """Return what pickles of arrays and numbers of NumPy name."""
    functions = [found for found in (_private.numpy_reconstruct, _private.numpy_scalar) if found is not None]
    dtypes = [kind for kind in vars(np.dtypes).values() if isinstance(kind, type) and kind is not np.dtypes.ObjectDType]
    return [*functions, np.ndarray, np.dtype, *dtypes]
