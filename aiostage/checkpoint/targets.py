"""Where the elements of a checkpoint go: into new memory of any device, into live tensors, or beside them first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch

from aiostage._copy.targets import copyable
from aiostage._device.streams import CallerStreams, device_errors
from aiostage._loop.workers import Workers, release_gil, releasing_gil
from aiostage.abc import Backend
from aiostage.checkpoint.transfer import Transfer
from aiostage.errors import AcceleratorUnavailableError, HostMemoryError, StagingError, said, shown
from aiostage.format.composites import COMPOSITES
from aiostage.format.decode import Memory
from aiostage.format.nodes import NodeTable, path_step, reading, sizes_of, view_of
from aiostage.format.safetensors import TensorRecord
from aiostage.format.values import torch_constant
from aiostage.leaf import Attribute, LinkedPath, Path, format_path, unlinked

__all__ = ["DeviceOption", "Devices", "ReadPlan", "Shares", "host_memory", "plan_reads"]

_TENSORS_AT_ONCE = 64
"""Tensors that one step of a thread allocates. Between steps a cancellation is noticed. A guess."""

_DeviceLike: TypeAlias = torch.device | str | int
DeviceOption: TypeAlias = _DeviceLike | Callable[[Path, torch.Tensor], _DeviceLike | None]
"""A device, or a function that is asked for that of each tensor."""

Shares: TypeAlias = "Mapping[torch.device | None, Mapping[str, int]]"
"""For each device, None for host memory, the tensors that it gets and how many bytes each takes."""

_META = torch.device("meta")
_ASK = object()


class Devices:
    """What the user wants of each tensor of a new tree.

    Args:
        device: A device for all, or a function that is called with the path of each tensor and with a tensor on the
            meta device that is like it, and returns a device, or None for host memory. None: host memory for all.
        backend: How to reach devices; None if there is no ``device``.

    Raises:
        TypeError: If a device is none.
        ValueError: If PyTorch knows no such device, or it is not the backend's.
        AcceleratorUnavailableError: If there is none.
    """

    def __init__(self, device: DeviceOption | None, backend: Backend | None) -> None:
        self._backend = backend
        self._ask = device if callable(device) else None
        self._known: dict[object, torch.device | None] = {}
        self._everywhere = None if callable(device) else self._resolved(device)

    def shares(
        self, table: NodeTable, records: Mapping[str, TensorRecord], sizes: Mapping[str, int], *, path: str
    ) -> Shares:
        """Find out which device gets which tensors of files.

        Args:
            table: The table of the nodes, looked through before.
            records: The tensors of files, by name.
            sizes: How much memory those that the tree needs take, in bytes, by name.
            path: The path of the manifest, for errors.

        Raises:
            ValueError: If tensors that share memory are to go to different devices, or one to where it cannot be.
            Exception: What the function raises.
        """
        if self._ask is None and self._everywhere is None:
            return {None: sizes}
        # Also for a single device: it finds arrays, which stay in host memory, and tensors that share memory with them.
        walk = _Walk(table, records, path, self._device_for)
        walk.run()
        shares: dict[torch.device | None, dict[str, int]] = {}
        for name, nbytes in releasing_gil(sizes.items()):
            shares.setdefault(walk.found[name], {})[name] = nbytes
        return shares

    async def allocate(
        self, shares: Shares, caller: CallerStreams, *, workers: Workers, path: str
    ) -> dict[str, torch.Tensor]:
        """Get memory, on devices for the work of the caller's streams.

        Args:
            shares: From :meth:`shares`.
            caller: Whose streams will use the memory.
            workers: Allocate.
            path: The path of the manifest, for errors.

        Returns:
            One-dimensional uint8 memory, uninitialized, by name.

        Raises:
            HostMemoryError: If there is not enough in host memory.
            torch.OutOfMemoryError: If there is not enough on a device.
            StagingError: If a device refuses for another reason.

        May be cancelled; nothing is left behind then.
        """
        found: dict[str, torch.Tensor] = {}
        for device, sizes in shares.items():
            if device is None or device == _META:
                found |= await workers.run(partial(host_memory, sizes, path=path, device=device))
                continue
            with device_errors():
                active = self._reached.active_devices()
            # A device that is used for the first time has no streams yet, and initializing it takes long: a first
            # allocation does that in a thread.
            if device not in active:
                await workers.run(partial(self._take, {}, {"": 1}, device, None))
            stream = caller.stream(device)
            rest = iter(sizes.items())
            async with workers.job() as job:
                while some := dict(islice(rest, _TENSORS_AT_ONCE)):
                    job.put(partial(self._take, found, some, device, stream))
        return found

    @property
    def _reached(self) -> Backend:
        assert self._backend is not None  # noqa: S101 - there is one where there are devices
        return self._backend

    def _device_for(self, place: LinkedPath, like: Callable[[], torch.Tensor]) -> torch.device | None:
        if self._ask is None:
            return self._everywhere
        path = unlinked(place)
        answer = self._ask(path, like())
        try:
            return self._resolved(answer)
        except (TypeError, ValueError, StagingError) as error:
            error.add_note(f"The function that was given as device= answered that for {format_path(path)}.")
            raise

    def _resolved(self, device: object) -> torch.device | None:
        """Return a device with its index, or None for host memory."""
        if device is None:
            return None
        if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
            raise TypeError(f"device= is a torch.device, its name, or a function that returns one, not {shown(device)}")
        if device not in self._known:
            try:
                resolved = torch.device(device)
            except RuntimeError as error:
                raise ValueError(f"device={shown(device)} is not a device: {said(error)}") from None
            self._known[device] = self._with_index(resolved)
        return self._known[device]

    def _with_index(self, device: torch.device) -> torch.device | None:
        if device.type == "cpu":
            return None
        if device.type == "meta":
            return _META
        if (reason := self._reached.unavailable_reason) is not None:
            raise AcceleratorUnavailableError(
                f"device={str(device)!r} is not available: {reason}.",
                remedy="Leave device= out to load into host memory.",
            )
        with device_errors():
            current = self._reached.current_device()
        if device.type != current.type:
            raise ValueError(
                f"device={str(device)!r} is not a device of the accelerator, which is called {current.type!r}"
            )
        return current if device.index is None else device

    def _take(
        self, found: dict[str, torch.Tensor], sizes: Mapping[str, int], device: torch.device, stream: Any
    ) -> None:
        """Allocate, in a worker thread."""
        try:
            for name, nbytes in sizes.items():
                found[name] = self._reached.allocate(nbytes, device, stream)
        except torch.OutOfMemoryError as error:
            error.add_note(f"It was to take {sum(sizes.values())} bytes more of the checkpoint.")
            raise
        except Exception as error:
            raise StagingError(
                f"{device} has no memory: {type(error).__name__}: {error}", remedy="Is there such a device?"
            ) from error


def host_memory(sizes: Mapping[str, int], *, path: str, device: torch.device | None = None) -> dict[str, torch.Tensor]:
    """Get one-dimensional uint8 memory on the host, or none on the meta device.

    Args:
        sizes: How much, in bytes, by name.
        path: The path of the manifest, for errors.
        device: None or the meta device.

    Raises:
        HostMemoryError: If there is not enough.
    """
    found: dict[str, torch.Tensor] = {}
    # An object, because torch would look at the text again for each tensor.
    device = device or torch.device("cpu")
    for name, nbytes in releasing_gil(sizes.items()):
        try:
            found[name] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            raise HostMemoryError(f"no memory for the tensor {shown(name)}: {error}", path=path) from error
    return found


class _Walk:
    """Goes through a tree in its order, asks once for the device of every tensor, and notes it for its memory."""

    def __init__(
        self,
        table: NodeTable,
        records: Mapping[str, TensorRecord],
        path: str,
        ask: Callable[[LinkedPath, Callable[[], torch.Tensor]], torch.device | None],
    ) -> None:
        self.found: dict[str, torch.device | None] = {}
        self._table = table
        self._records = records
        self._path = path
        self._ask = ask
        self._places: dict[str, LinkedPath] = {}

    def run(self) -> None:
        pending: list[tuple[int, LinkedPath, object]] = []
        # With the device, because a node may be met again under one that was chosen otherwise, which is refused.
        seen: set[tuple[int, object]] = set()
        self._push(pending, [(None, self._table.root)], _ASK)
        while pending:
            index, place, where = pending.pop()
            if (index, where) not in seen:
                seen.add((index, where))
                self._visit(index, place, where, pending)
            release_gil()

    def _visit(
        self, index: int, place: LinkedPath, where: object, pending: list[tuple[int, LinkedPath, object]]
    ) -> None:
        form, children = self._table.forms[index], self._table.children[index]
        kind = form["is"]
        self._push(
            pending,
            [((Attribute(name), place), child) for name, child in form.get("attributes", {}).items()],
            _ASK,
        )
        if kind == "tensor" or kind in COMPOSITES:
            device = self._ask(place, partial(self._like, form, children)) if where is _ASK else where
            if kind == "tensor":
                self._claim(form["name"], device, place)
            elif device == _META:
                raise ValueError(
                    f"{format_path(unlinked(place))} is a {kind} tensor, and PyTorch has none on the meta device: give "
                    f"device= a function that returns None for it, or leave it out with only="
                )
            # Its parts and its gradient go where it goes.
            self._push(pending, [(place, child) for child in children], device)
        elif kind == "ndarray":
            self._push(pending, [(place, child) for child in children], None)
        else:
            found = []
            for key, child in releasing_gil(self._table.edges(index)):
                here = (path_step(key), place)
                found += [(here, key), (here, child)]
            self._push(pending, found, _ASK)

    def _push(
        self, pending: list[tuple[int, LinkedPath, object]], children: Sequence[tuple[LinkedPath, Any]], where: object
    ) -> None:
        for place, child in reversed(children):
            node = self._table.node(child)
            if node is not None:
                pending.append((node, place, where))

    def _claim(self, name: str, device: Any, place: LinkedPath) -> None:
        before = self.found.setdefault(name, device)
        first = self._places.setdefault(name, place)
        if before != device:
            raise ValueError(
                f"{format_path(unlinked(first))} and {format_path(unlinked(place))} share memory, but are selected for "
                f"{before or 'host memory'} and {device or 'host memory'}: have them on one device "
                f"(NumPy arrays lie in host memory)"
            )

    def _like(self, form: dict[str, Any], children: Sequence[Any]) -> torch.Tensor:
        """Return a tensor on the meta device that is like one of the tree."""
        with reading(self._path):
            if form["is"] == "tensor":
                view = view_of(form, self._records)
                return torch.empty_strided(view.shape, view.stride, dtype=view.dtype, device=_META)
            dtype = torch_constant(form["dtype"]) if "dtype" in form else self._dtype_of_values(form, children)
            return torch.empty(form["shape"], dtype=dtype, device=_META)

    def _dtype_of_values(self, form: dict[str, Any], children: Sequence[Any]) -> torch.dtype:
        """Return the dtype of a sparse tensor."""
        values = self._table.node(children[2 if form["is"] == "sparse_compressed" else 1])
        if values is None:
            raise ValueError("a sparse tensor has no values")
        return view_of(self._table.forms[values], self._records).dtype


@dataclass(slots=True)
class ReadPlan:
    """Where elements are to be read to.

    Attributes:
        contents: For names of tensors in files, live tensors and new host memory.
        direct: The live tensors among them.
    """

    contents: dict[str, torch.Tensor] = field(default_factory=dict)
    direct: list[torch.Tensor] = field(default_factory=list)


def plan_reads(
    transfer: Transfer,
    memory: Memory,
    positions: Mapping[str, int],
    device_of: Callable[[torch.Tensor], torch.device | None],
    *,
    in_place: bool,
    path: str,
) -> ReadPlan:
    """Decide where elements that have not been read yet go, and have those copied that do not go straight.

    Args:
        transfer: The transfer between the two trees; gets the copies.
        memory: The memory of the loaded tree.
        positions: Where the data of each tensor begins in its file.
        device_of: Returns the device that a tensor is on, or None for host memory.
        in_place: Whether elements may go straight into live tensors.
        path: The path of the manifest, for errors.

    Raises:
        HostMemoryError: If there is no memory for what does not go straight.
    """
    placement = ReadPlan()
    waiting: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    records: dict[str, TensorRecord] = {}
    for _, live, loaded in releasing_gil(transfer.pairs):
        if not loaded.is_meta:
            transfer.add(live, loaded, device_of(live))
        elif live.numel():
            record = memory.origin(loaded)
            records[record.name] = record
            waiting.setdefault(record.name, []).append((live, loaded))
    beside: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, targets in releasing_gil(waiting.items()):
        first = targets[0][0]
        is_cast = any(live.dtype is not loaded.dtype for live, loaded in targets)
        # Bytes of a file go straight into one tensor only, and are not converted on the way.
        if in_place and not is_cast and _is_one([live for live, _ in targets]) and _takes(first, positions[name]):
            placement.contents[name] = copyable(first)
            placement.direct.append(first)
        else:
            beside[name] = targets
    new = host_memory(sizes_of(beside, records, {}), path=path)
    placement.contents |= new
    for name, targets in releasing_gil(beside.items()):
        for live, loaded in targets:
            transfer.add(live, _elements(new[name], loaded), device_of(live))
    return placement


def _is_one(targets: list[torch.Tensor]) -> bool:
    """Return whether several live tensors are the same memory, looked at in the same way."""
    first = targets[0]
    return all(
        live is first or (live.data_ptr() == first.data_ptr() and live.stride() == first.stride()) for live in targets
    )


def _takes(live: torch.Tensor, position: int) -> bool:
    """Return whether bytes of a file can be put into a live tensor a part at a time."""
    # Its memory has other values than its elements.
    if live.is_conj() or live.is_neg():
        return False
    if live.is_contiguous():
        return True
    # Expanded: several elements would be written to one address.
    if any(size > 1 and stride == 0 for size, stride in zip(live.shape, live.stride(), strict=True)):
        return False
    # Parts begin at multiples of every element size. If the elements do too, no part cuts one in two.
    return position % live.element_size() == 0


def _elements(data: torch.Tensor, loaded: torch.Tensor) -> torch.Tensor:
    """Return memory that has elements in index order as a tensor like a loaded one, which has none."""
    dtype = copyable(loaded).dtype
    return data.view(dtype).view(loaded.shape)
