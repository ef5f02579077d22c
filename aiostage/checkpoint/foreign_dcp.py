"""Directories of ``torch.distributed.checkpoint``, read without running what their pickles name. All of it blocks."""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, BinaryIO

import torch

from aiostage.abc import Buffer
from aiostage.errors import CheckpointCorruptError, CheckpointError

__all__ = ["DcpDirectory", "MetadataUnpickler", "StandIn", "open_regular", "read_dcp"]

_MAX_BYTES = 1 << 30
"""The longest .metadata that is read. A guess: a pickle may need ten times its size in memory."""

_PATHS = frozenset(("PosixPath", "PurePath", "WindowsPath"))
"""In pickles of Python 3.13 the module of these classes is ``pathlib._local``."""

_METADATA = {
    "torch.distributed.checkpoint.metadata": frozenset(
        (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    "torch.serialization": frozenset(("_get_layout",)),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}
"""By module, what the metadata of DCP consists of."""

_FILES = {"torch.distributed.checkpoint.filesystem": frozenset(("_StorageInfo", "_StoragePrefix"))}
"""By module, what the metadata of its FileSystemWriter consists of besides."""


class _NeedsCode(pickle.UnpicklingError):
    """A pickle names what may not be run. Other pickles that cannot be read are damaged."""


class StandIn:
    """Holds the state of an object of a class of PyTorch, whose own code is not run."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)
        else:
            self.state = state


class MetadataUnpickler(pickle.Unpickler):
    """Makes the metadata of a DCP checkpoint out of stand-ins, and nothing else.

    A pickle can set attributes of the classes that it names, so no class of PyTorch or Python is handed to it.

    Args:
        data: The pickle.
        more: By module, names of further classes that it may consist of.

    Attributes:
        stand_ins: The classes of the stand-ins, each with the module and the name that it stands for.
    """

    def __init__(self, data: Buffer | bytes, more: Mapping[str, Collection[str]]) -> None:
        super().__init__(io.BytesIO(data))
        self.stand_ins: dict[type, tuple[str, str]] = {}
        self._classes: dict[tuple[str, str], type] = {}
        self._more = more

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a class on the list; or a size, a dtype or a dict."""
        if name in _METADATA.get(module, ()) or name in self._more.get(module, ()):
            if (module, name) not in self._classes:
                made = self._classes[module, name] = type(name, (StandIn,), {})
                self.stand_ins[made] = (module, name)
            return self._classes[module, name]
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        found = vars(torch).get(name) if module == "torch" else None
        if isinstance(found, (torch.dtype, torch.memory_format)):
            return found
        raise _NeedsCode(f"it names {module}.{name}"[:200])


def read_dcp(path: str) -> dict[str, Any]:
    """Read all of a checkpoint, whatever number of ranks has saved it. It has no checksums. Blocks.

    Raises:
        The errors of :class:`DcpDirectory`.
    """
    return DcpDirectory(path).read()


@contextmanager
def _damage(path: str) -> Iterator[None]:
    """Turn an error of reading into one that says that the checkpoint is damaged, or needs code."""
    try:
        yield
    except (CheckpointError, OSError):
        raise
    except _NeedsCode as error:
        raise CheckpointError(
            f"it is a checkpoint of torch.distributed.checkpoint that needs code: {error!s:.200}.",
            path=path,
            remedy="If you trust it, read it with torch.distributed.checkpoint.load().",
        ) from error
    except Exception as error:
        # Objects of any shape can be in a pickle.
        raise CheckpointCorruptError(
            f"it is not a checkpoint of torch.distributed.checkpoint: {error!r:.200}.", path=path
        ) from error


def open_regular(path: str) -> BinaryIO:
    """Open a file of a checkpoint.

    Raises:
        CheckpointCorruptError: If there is none, or not a regular one.
        OSError: If the system refuses.
    """
    # Not FileNotFoundError: that would say that there is no checkpoint.
    if not os.path.exists(path):
        raise CheckpointCorruptError("the file is missing.", path=path)
    # A FIFO would be waited for.
    if not os.path.isfile(path):
        raise CheckpointCorruptError("it is not a regular file.", path=path)
    return open(path, "rb")


class DcpDirectory:
    """Reads one directory. All of it blocks.

    Args:
        path: The path of the directory.

    Attributes:
        entries: By name, what describes a tensor, or a value that was pickled. A tensor's has ``size`` and ``chunks``.

    Raises:
        CheckpointError: If it needs code.
        CheckpointCorruptError: If its files do not fit each other.
        OSError: If the system refuses.

    Its methods raise the same.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._index = os.path.join(path, ".metadata")
        with open_regular(self._index) as file:
            if os.fstat(file.fileno()).st_size > _MAX_BYTES:
                raise CheckpointCorruptError("it is too long for a .metadata.", path=self._index)
            data = file.read()
        with _damage(self._index):
            about = MetadataUnpickler(data, _FILES).load()
            self.entries: Mapping[str, Any] = about.state_dict_metadata
            self._paths: Mapping[str, Any] = about.planner_data or {}
            # By name, where its bytes lie; by name and offsets, where those of a chunk lie.
            self._places: dict[tuple[str, tuple[int, ...]], Any] = {
                (found.fqn, tuple(getattr(found, "offset", None) or ())): place
                for found, place in about.storage_data.items()
            }
            for name, entry in self.entries.items():
                if self.is_tensor(name) and not isinstance(self.dtype(name), torch.dtype):
                    raise ValueError(f"{name!r:.80} has no dtype")
                for chunk in entry.chunks if self.is_tensor(name) else ():
                    self._places[name, tuple(chunk.offsets)].length  # noqa: B018 - there is one, with a length

    def is_tensor(self, name: str) -> bool:
        """Return whether an entry is a tensor; others are values that were pickled."""
        return type(self.entries[name]).__name__ == "TensorStorageMetadata"

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        found: torch.dtype = self.entries[name].properties.state[0]
        return found

    def path_of(self, name: str) -> tuple[Any, ...]:
        """Return where in the state dict an entry was."""
        with _damage(self._index):
            return tuple(self._paths.get(name, (name,)))

    def places(self, name: str) -> list[tuple[str, int, int]]:
        """Return where the bytes of an entry are: for each chunk the file, the first byte and how many there are."""
        with _damage(self._index):
            offsets = [tuple(chunk.offsets) for chunk in self.entries[name].chunks] if self.is_tensor(name) else [()]
            places = [self._places[name, each] for each in offsets]
            return [(self._file(place), int(place.offset), int(place.length)) for place in places]

    def value(self, name: str) -> Any:
        """Read one entry: a tensor, all of it, or a value."""
        with _damage(self._index):
            if self.is_tensor(name):
                return self._tensor(name, self.entries[name])
            return self._load(self._places[name, ()])

    def read(self) -> dict[str, Any]:
        """Read everything, and return the state dict."""
        tree: dict[str, Any] = {}
        for name in self.entries:
            value = self.value(name)
            with _damage(self._index):
                _put(tree, self.path_of(name), value)
        with _damage(self._index):
            _make_lists(tree)
        return tree

    def _tensor(self, name: str, entry: Any) -> torch.Tensor:
        dtype = self.dtype(name)
        nbytes = math.prod(entry.size) * dtype.itemsize
        # Checked before the allocation: a small file must not ask for more memory than its chunks have bytes.
        if nbytes > sum(self._places[name, tuple(chunk.offsets)].length for chunk in entry.chunks):
            raise ValueError(f"the chunks of {name!r:.80} do not cover it")
        made = torch.empty(entry.size, dtype=dtype, device="cpu")
        filled = 0
        for chunk in entry.chunks:
            part = self._load(self._places[name, tuple(chunk.offsets)])
            if not isinstance(part, torch.Tensor) or part.shape != chunk.sizes or part.dtype is not made.dtype:
                raise ValueError(f"a chunk of {name!r:.80} is not what it should be")
            target = made
            for dimension, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                # narrow() would count from the end.
                if offset < 0:
                    raise ValueError(f"a chunk of {name!r:.80} lies outside of it")
                target = target.narrow(dimension, offset, size)
            target.copy_(part.detach())
            filled += part.numel()
        # Both: two chunks at one place could have as many elements as the tensor, and leave uninitialized memory in it.
        if filled != made.numel() or _overlap(entry.chunks):
            raise ValueError(f"the chunks of {name!r:.80} do not cover it")
        return made

    def _load(self, place: Any) -> Any:
        """Load what lies at a place, each of which is a file of ``torch.save``."""
        with open_regular(self._file(place)) as file:
            file.seek(place.offset)
            data = file.read(place.length)
        if len(data) != place.length:
            raise CheckpointCorruptError(f"it ends before byte {place.offset + place.length}.", path=file.name)
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise _NeedsCode(str(error)) from error

    def _file(self, place: Any) -> str:
        name = place.relative_path
        if os.path.basename(name) != name or getattr(place, "transform_descriptors", None):
            raise ValueError(f"{name!r:.80} is not a plain file of the checkpoint")
        return os.path.join(self._path, name)


def _overlap(chunks: Sequence[Any]) -> bool:
    """Return whether two chunks of a tensor share an element."""
    boxes = [(chunk.offsets, chunk.sizes) for chunk in chunks if math.prod(chunk.sizes)]
    if not boxes or not boxes[0][0]:
        return len(boxes) > 1
    # A sweep along the dimension with the most different offsets, which is the sharded one: few chunks meet at a time.
    sweep = max(range(len(boxes[0][0])), key=lambda dimension: len({offsets[dimension] for offsets, _ in boxes}))
    open_boxes: list[tuple[Any, Any]] = []
    for offsets, sizes in sorted(boxes, key=lambda box: box[0][sweep]):
        open_boxes = [box for box in open_boxes if box[0][sweep] + box[1][sweep] > offsets[sweep]]
        for others, lengths in open_boxes:
            pairs = zip(offsets, sizes, others, lengths, strict=True)
            if all(start < other + length and other < start + size for start, size, other, length in pairs):
                return True
        open_boxes.append((offsets, sizes))
    return False


class _Items(dict[int, Any]):
    """Collects the items of a list, which come in any order."""


def _put(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    """Put a value at a path; steps that are numbers are indices of lists."""
    at = tree
    for step, following in pairwise(path):
        at = at.setdefault(step, _Items() if type(following) is int else {})
    at[path[-1]] = value


def _make_lists(tree: dict[Any, Any]) -> None:
    """Make lists of what was collected for them, innermost first."""
    order: list[tuple[Any, Any]] = []
    pending: list[Any] = [tree]
    while pending:
        at = pending.pop()
        for key, value in at.items():
            if isinstance(value, dict):
                order.append((at, key))
                pending.append(value)
    for at, key in reversed(order):
        items = at[key]
        if type(items) is _Items:
            if sorted(items) != list(range(len(items))):
                raise ValueError("a list lacks items")
            at[key] = [items[place] for place in range(len(items))]
