"""How two checkpoints differ: keys, shapes, dtypes, values, and tensors element by element."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from anyio.to_thread import run_sync

from aiostage.cli.contents import Contents, open_contents
from aiostage.cli.entries import TreeEntry
from aiostage.cli.finding import CheckpointRun, Place, find_checkpoints
from aiostage.cli.output import Output, counted
from aiostage.errors import CheckpointError

__all__ = ["Difference", "diff", "difference"]

_BATCH_BYTES = 64 << 20
"""How much of each checkpoint is read at once; a larger tensor is read as a whole."""

_CHUNK_ELEMENTS = 1 << 20
"""How many elements are compared at once, since what is compared is converted."""

_LONGEST_VALUE = 60
_FLAT = frozenset(("safetensors", "shards of a hub"))
"""Kinds that have names of tensors, and no paths."""

_WITH_ATTRIBUTES = frozenset(("aiostage", "torch.save"))
"""Kinds that have what containers and tensors carry as attributes."""


async def diff(first: str, second: str, out: Output, *, values: bool = True) -> None:
    """Compare two checkpoints of any kinds, and print where they differ.

    Tensors are read and compared in batches, so memory stays bounded: by 128 MiB or so, or by twice the largest tensor.
    Files of ``torch.save`` from before they were archives are read as a whole.

    Args:
        first: A path or a URL.
        second: Another one.
        out: Where to print. Its status is 1 if they differ.
        values: Whether elements are compared; if not, only headers are read.

    Raises:
        CheckpointNotFoundError: If one is not there.
        CheckpointCorruptError: If one is damaged.
        CheckpointError: If one needs code, or is a run.
        OSError: If a storage refuses.
    """
    async with (
        open_contents(await _place(first), elements=values) as left,
        open_contents(await _place(second), elements=values) as right,
    ):
        await _Diff(left, right, out, values).run()


async def _place(source: str) -> Place:
    found = await find_checkpoints(source)
    if isinstance(found, CheckpointRun):
        raise CheckpointError(
            f"it is a run of {counted(len(found.names), 'checkpoint')}.", path=source, remedy="Name one of them."
        )
    if found.read is not None:
        # Others would seem to be equal that differ in what is left out.
        found.read.refuse_part()
    return found


class _Diff:
    def __init__(self, left: Contents, right: Contents, out: Output, values: bool) -> None:
        self._left, self._right, self._out, self._values = left, right, out, values
        self._same = 0
        self._found: list[dict[str, Any]] = []

    async def run(self) -> None:
        left, right = self._by_place(self._left), self._by_place(self._right)
        self._out.data.update(differences=self._found)
        for which, entries, others in (("first", left, right), ("second", right, left)):
            for place, entry in entries.items():
                # Of a container that is missing, what is in it says so; formats without containers lack them all.
                if place not in others and (entry.kind != "container" or _is_empty(entry)):
                    self._tell(entry, f"only in the {which}: {_short(entry)}", f"only_in_{which}")
        pairs: list[tuple[TreeEntry, TreeEntry]] = []
        for place, entry in left.items():
            if place in right:
                one, two = _followed(entry, left), _followed(right[place], right)
                if one.kind == two.kind == "tensor":
                    if self._are_alike(one, two, entry):
                        pairs.append((one, two))
                else:
                    self._compare(one, two, entry)
        # Tensors that are met at several paths are compared once.
        unique = list({(one.path, two.path): (one, two) for one, two in pairs}.values())
        if self._values:
            for batch in _batches(unique):
                await self._compare_elements(batch)
        self._out.status = 1 if self._found else 0
        self._out.data.update(same=not self._found, tensors=len(unique), values_compared=self._values)
        verdict = counted(len(self._found), "difference") if self._found else "no difference"
        text = f"{verdict}; {counted(len(unique), 'tensor')} of the same shape and dtype"
        text += ", compared element by element" if self._values else ", whose elements were not compared"
        self._out.line(text, "bad" if self._found else "good")

    def _by_place(self, contents: Contents) -> dict[tuple[str, ...], TreeEntry]:
        """Return entries by their paths; by their names as text if one of the formats knows nothing else."""
        kinds = {self._left.kind, self._right.kind}
        entries = [each for each in contents.entries if kinds <= _WITH_ATTRIBUTES or not _is_of_an_attribute(each)]
        return {(entry.name,) if kinds & _FLAT else entry.path: entry for entry in entries}

    def _tell(self, entry: TreeEntry, text: str, what: str, **more: Any) -> None:
        self._found.append({"path": list(entry.path), "difference": what, **more})
        colour = "bad" if what == "only_in_first" else "good" if what == "only_in_second" else None
        self._out.line(f"{entry.name}: {text}", colour)
        self._out.flush()

    def _compare(self, one: TreeEntry, two: TreeEntry, at: TreeEntry) -> None:
        """Compare what is not two tensors."""
        if one.kind == two.kind == "container":
            # How many there are in it is told by each that is missing; formats without containers know no kinds.
            kinds = [each.text.rpartition(" of ")[0] for each in (one, two)]
            if kinds[0] != kinds[1] and "state dict" not in kinds and not {self._left.kind, self._right.kind} & _FLAT:
                self._tell(at, f"{kinds[0]} became {kinds[1]}", "kind", first=kinds[0], second=kinds[1])
        elif one.kind != two.kind or one.text != two.text or one.more != two.more:
            self._tell(at, f"{_short(one)} became {_short(two)}", "value", first=one.text, second=two.text)

    def _are_alike(self, one: TreeEntry, two: TreeEntry, at: TreeEntry) -> bool:
        """Compare what is known of two tensors but their elements; return whether these can be compared."""
        texts = [f"{each.dtype} {each.shape}" for each in (one, two)]
        if texts[0] != texts[1]:
            what = "shape" if one.shape != two.shape else "dtype"
            self._tell(at, f"{texts[0]} became {texts[1]}", what, first=texts[0], second=texts[1])
        for key in ("class", "requires_grad"):
            known = [(each.more or {}).get(key) for each in (one, two)]
            # Formats that do not say so say nothing of it.
            if None not in known and known[0] != known[1]:
                self._tell(at, f"{key} {known[0]} became {known[1]}", key, first=known[0], second=known[1])
        return texts[0] == texts[1]

    async def _compare_elements(self, batch: list[tuple[TreeEntry, TreeEntry]]) -> None:
        firsts = await self._left.read([one for one, _ in batch])
        seconds = await self._right.read([two for _, two in batch])
        for (entry, _), one, two in zip(batch, firsts, seconds, strict=True):
            found = await run_sync(partial(difference, one, two))
            if not found.count:
                continue
            text = f"{found.count:,} of {one.numel():,} elements differ"
            if found.max_abs is not None:
                text += f", by {found.max_abs:.6g} at most" if found.max_abs else ""
                text += f", {found.nans:,} NaN in one of the two only" if found.nans else ""
                text += ", in bits that make no other number" if not found.max_abs and not found.nans else ""
            more = {"count": found.count, "of": one.numel(), "max_abs": found.max_abs, "nans": found.nans}
            self._tell(entry, text, "elements", **more)


@dataclass(frozen=True, slots=True)
class Difference:
    """How two tensors of one dtype and shape differ.

    Attributes:
        count: How many elements differ in any bit.
        max_abs: The largest absolute difference of two that are numbers; 0 if the bits that differ make no other
            number, as those of a negative zero; None if the elements cannot be converted to numbers.
        nans: How many elements are NaN in one of the two only.
    """

    count: int = 0
    max_abs: float | None = 0.0
    nans: int = 0


def difference(one: torch.Tensor, two: torch.Tensor) -> Difference:
    """Compare two tensors bit by bit, and where these differ number by number.

    Args:
        one: A tensor in host memory.
        two: Another one, of the same dtype and shape.
    """
    count = nans = 0
    largest: float | None = 0.0
    one, two = one.detach().resolve_conj().resolve_neg(), two.detach().resolve_conj().resolve_neg()
    for a, b in zip(_chunks(one), _chunks(two), strict=True):
        if torch.equal(_bytes(a), _bytes(b)):
            continue
        bits = (_bytes(a) != _bytes(b)).any(dim=1)
        different = int(bits.sum())
        if different:
            count += different
            apart, unlike = _apart(*(_bytes(each)[bits].view(-1).view(each.dtype) for each in (a, b)))
            nans += unlike
            largest = None if apart is None or largest is None else max(largest, apart)
    return Difference(count, largest, nans)


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Iterate over the elements in index order, some at a time."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
        yield flat[start : start + _CHUNK_ELEMENTS].contiguous()


def _bytes(elements: torch.Tensor) -> torch.Tensor:
    return elements.view(torch.uint8).view(elements.numel(), elements.element_size())


def _apart(one: torch.Tensor, two: torch.Tensor) -> tuple[float | None, int]:
    """Return the largest absolute difference of two vectors, and how often one of two is NaN only."""
    if not one.dtype.is_complex and not one.dtype.is_floating_point:
        return float(_apart_integers(one, two)), 0
    try:
        wide = torch.complex128 if one.dtype.is_complex else torch.float64
        one, two = one.to(wide), two.to(wide)
    except RuntimeError:
        # Of packed numbers there is no conversion.
        return None, 0
    # Of equal infinities the difference is not a number.
    no_number = one.isnan() | two.isnan() | (one == two)
    apart = (one - two).abs().masked_fill(no_number, 0.0)
    # A number and an infinity are infinitely far apart, also where a part of a complex one is not a number then.
    return float(apart.nan_to_num(nan=math.inf, posinf=math.inf).max()), int((one.isnan() ^ two.isnan()).sum())


def _apart_integers(one: torch.Tensor, two: torch.Tensor) -> int:
    unsigned = one.dtype is torch.uint64
    one, two = (one.view(torch.int64), two.view(torch.int64)) if unsigned else (one.long(), two.long())
    if unsigned:
        # In the order of signed ones.
        one, two = one ^ torch.iinfo(torch.int64).min, two ^ torch.iinfo(torch.int64).min
    # Modulo 2 to the power of 64, in which the difference is right: it is below 0 if it is at least 2 to the 63.
    apart = torch.where(one > two, one - two, two - one)
    wrapped = apart[apart < 0]
    return int(wrapped.max()) + (1 << 64) if wrapped.numel() else int(apart.max())


def _batches(pairs: Iterable[tuple[TreeEntry, TreeEntry]]) -> Iterator[list[tuple[TreeEntry, TreeEntry]]]:
    batch: list[tuple[TreeEntry, TreeEntry]] = []
    nbytes = 0
    for pair in pairs:
        if batch and nbytes + pair[0].nbytes > _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(pair)
        nbytes += pair[0].nbytes
    if batch:
        yield batch


def _followed(entry: TreeEntry, entries: dict[tuple[str, ...], TreeEntry]) -> TreeEntry:
    """Return the tensor that a reference is to: formats without ties have it twice."""
    if entry.kind != "reference":
        return entry
    found = entries.get(entry.source) or entries[(".".join(entry.source) or ".",)]
    return found if found.kind == "tensor" else entry


def _is_of_an_attribute(entry: TreeEntry) -> bool:
    """Return whether a place is an attribute, or in one; parts of objects have numbers."""
    return entry.inner and any(step.startswith("<") and not step[1:-1].isdecimal() for step in entry.path)


def _is_empty(entry: TreeEntry) -> bool:
    return entry.text.endswith(" of 0")


def _short(entry: TreeEntry) -> str:
    if entry.kind == "tensor":
        return f"{entry.text} {entry.dtype} {entry.shape}"
    text = f"the same as {entry.text}" if entry.kind == "reference" else entry.text
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
