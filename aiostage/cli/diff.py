"""The command `diff`: keys, shapes, dtypes and values of two checkpoints, and their tensors element by element."""

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
from aiostage.cli.output import Output, counted, shortened
from aiostage.errors import CheckpointError

__all__ = ["Difference", "diff", "difference"]

_BATCH_BYTES = 64 << 20
"""Bytes of each checkpoint that are read at once. A larger tensor is read as a whole."""

_CHUNK_ELEMENTS = 1 << 20
"""Elements that are compared at once. Each is converted to 8 or 16 bytes for that."""

_FLAT = frozenset(("safetensors", "shards of a hub"))
"""Kinds that have names for tensors, and no paths."""

_WITH_ATTRIBUTES = frozenset(("aiostage", "torch.save"))
"""Kinds that keep the attributes of containers and tensors."""


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
        # Otherwise two checkpoints that differ in a part that is left out would seem equal.
        found.read.refuse_part()
    return found


class _Diff:
    """Compares two open checkpoints, and prints each difference when it is found."""

    def __init__(self, left: Contents, right: Contents, out: Output, values: bool) -> None:
        self._left, self._right, self._out, self._values = left, right, out, values
        self._same = 0
        self._found: list[dict[str, Any]] = []

    async def run(self) -> None:
        left, right = self._by_place(self._left), self._by_place(self._right)
        self._out.data.update(differences=self._found)
        for which, entries, others in (("first", left, right), ("second", right, left)):
            for place, entry in entries.items():
                # A missing container is not reported, because each entry in it is. Some formats have no containers.
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
        # Tensors at several paths are compared once.
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
        """Return entries by their paths, or by their names as text if one of the two formats has no paths."""
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
            # Only the kinds are compared. A different number of entries shows in the entries that are missing.
            kinds = [each.text.rpartition(" of ")[0] for each in (one, two)]
            if kinds[0] != kinds[1] and "state dict" not in kinds and not {self._left.kind, self._right.kind} & _FLAT:
                self._tell(at, f"{kinds[0]} became {kinds[1]}", "kind", first=kinds[0], second=kinds[1])
        elif one.kind != two.kind or one.text != two.text or one.more != two.more:
            self._tell(at, f"{_short(one)} became {_short(two)}", "value", first=one.text, second=two.text)

    def _are_alike(self, one: TreeEntry, two: TreeEntry, at: TreeEntry) -> bool:
        """Compare two tensors except for their elements; return whether these can be compared."""
        texts = [f"{each.dtype} {each.shape}" for each in (one, two)]
        if texts[0] != texts[1]:
            what = "shape" if one.shape != two.shape else "dtype"
            self._tell(at, f"{texts[0]} became {texts[1]}", what, first=texts[0], second=texts[1])
        for key in ("class", "requires_grad"):
            known = [(each.more or {}).get(key) for each in (one, two)]
            # Not every format has this.
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
        # Bytes and not numbers: NaN differs from itself, and 0.0 equals -0.0. The quick test first, as most are equal.
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
        # Packed numbers have no conversion.
        return None, 0
    # The difference of two equal infinities is NaN.
    no_number = one.isnan() | two.isnan() | (one == two)
    apart = (one - two).abs().masked_fill(no_number, 0.0)
    # The difference of a number and an infinity is infinite, also if a part of a complex one is NaN then.
    return float(apart.nan_to_num(nan=math.inf, posinf=math.inf).max()), int((one.isnan() ^ two.isnan()).sum())


def _apart_integers(one: torch.Tensor, two: torch.Tensor) -> int:
    unsigned = one.dtype is torch.uint64
    one, two = (one.view(torch.int64), two.view(torch.int64)) if unsigned else (one.long(), two.long())
    if unsigned:
        # With the highest bit flipped, signed integers have the order of unsigned ones.
        one, two = one ^ torch.iinfo(torch.int64).min, two ^ torch.iinfo(torch.int64).min
    # int64 wraps around. A difference of 2**63 or more comes out below 0, and is right modulo 2**64.
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
    """Return the tensor that a reference leads to. Formats without ties have that tensor twice."""
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
    return shortened(f"the same as {entry.text}" if entry.kind == "reference" else entry.text)
