"""Reading what DCP pickles, without running code that a pickle names.

A pickle can call any function that it names. Metadata is therefore unpickled into stand-ins: classes of the unpickler's
own, which only keep their arguments and state. The real objects are made afterwards from an allowed list of names.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import PurePath
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.metadata import Metadata

from aiostage import _private
from aiostage.checkpoint.foreign_dcp import MetadataUnpickler
from aiostage.errors import CheckpointError, said

__all__ = ["read_metadata", "read_value"]

_allowing = Lock()
"""PyTorch has one list of safe classes for the process. Of two contexts in two threads, the first to end would take
away the classes of the other."""


def read_metadata(data: Any, records: type) -> Metadata:
    """Unpickle the metadata of a checkpoint.

    Args:
        data: Its bytes.
        records: The class of the records, :class:`~aiostage.dcp.records.Record`.

    Raises:
        Exception: If it is damaged, or names anything else.
    """
    unpickler = MetadataUnpickler(data, {records.__module__: (records.__qualname__,)})
    found = unpickler.load()
    # The pickle has been read to its end. Nothing in it can call the real classes, which come in only now.
    makers = {made: _maker(names, records) for made, names in unpickler.stand_ins.items()}
    metadata = _Real(makers).of(found)
    if type(metadata) is not Metadata:
        raise ValueError("it is not Metadata")
    return metadata


def _maker(names: tuple[str, str], records: type) -> Callable[..., Any]:
    """Return the function or class that makes the objects of a stand-in."""
    module, name = names
    if module == records.__module__:
        return records
    if module in ("pathlib", "pathlib._local"):
        # A PosixPath of the writer's machine cannot be made on every other one.
        return PurePath
    made: Callable[..., Any] = (
        _private.require("get_layout") if name == "_get_layout" else getattr(torch_metadata, name)
    )
    return made


class _Real:
    """Makes the objects that stand-ins stand for, and the containers around them, each once.

    Once, because a small pickle can refer to one object many times: made anew at each reference, 60 nested pairs would
    become 2**60 objects. A container inside itself ends in RecursionError, and the metadata is refused.

    Args:
        makers: The functions and classes that make them, by the class of the stand-in.
    """

    def __init__(self, makers: dict[type, Callable[..., Any]]) -> None:
        self._makers = makers
        self._known: dict[int, Any] = {}

    def of(self, found: Any) -> Any:
        """Return the real object for one that was unpickled, which outlives this."""
        kind = type(found)
        if kind not in (dict, list, tuple, torch.Size) and kind not in self._makers:
            return found
        if id(found) not in self._known:
            self._known[id(found)] = self._made(kind, found)
        return self._known[id(found)]

    def _made(self, kind: type, found: Any) -> Any:
        if kind is dict:
            return {self.of(key): self.of(value) for key, value in found.items()}
        if kind not in self._makers:
            return kind(map(self.of, found))
        maker = self._makers[kind]
        if not isinstance(maker, type) or issubclass(maker, (Enum, PurePath)):
            return maker(*map(self.of, found.arguments))
        # The class is not called: unpickling restores the state, and __init__ may need other arguments.
        made: Any = object.__new__(maker)
        if hasattr(maker, "__setstate__"):
            made.__setstate__(self.of(found.state))
        else:
            vars(made).update({name: self.of(value) for name, value in vars(found).items() if name != "arguments"})
        return made


def read_value(file: io.BytesIO, *, weights_only: bool) -> Any:
    """Unpickle a value that is not a tensor.

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
                f"a value in it is not plain data, and weights_only=True refuses it: {said(error)}.",
                remedy="If you trust the checkpoint, pass weights_only=False; or pass its classes to "
                "torch.serialization.add_safe_globals() first.",
            ) from error


def _numpy() -> list[Any]:
    """Return the functions and classes that pickles of NumPy's arrays and numbers name."""
    # Without the dtype of objects: an array of that consists of further pickled objects.
    functions = [found for found in (_private.numpy_reconstruct, _private.numpy_scalar) if found is not None]
    dtypes = [kind for kind in vars(np.dtypes).values() if isinstance(kind, type) and kind is not np.dtypes.ObjectDType]
    return [*functions, np.ndarray, np.dtype, *dtypes]
