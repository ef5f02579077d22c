"""What a checkpoint consists of, and what lies below a path, in lines of text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from aiostage.abc import Storage
from aiostage.checkpoint.reader import Outline
from aiostage.checkpoint.resolving import open_checkpoint, placement_of
from aiostage.checkpoint.verify import outline_of
from aiostage.cli.finding import Found, find
from aiostage.errors import CheckpointCorruptError
from aiostage.format.manifest import read_summary
from aiostage.format.nodes import LOOKED_INTO, NodeTable, reading
from aiostage.format.parts import DIGEST_NAME, digest_of_parts
from aiostage.format.placement import Placement
from aiostage.format.values import read_scalar
from aiostage.storage.commit import MANIFEST_NAME
from aiostage.storage.locate import locate

__all__ = ["inspect"]

_LONGEST_VALUE = 60
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


async def inspect(source: str, *, tree: bool = True) -> AsyncIterator[str]:
    """Describe a checkpoint, or name those that lie below a path; only manifests and headers are read.

    Args:
        source: A path or a URL.
        tree: Whether the tree of a checkpoint is described too.

    Returns:
        An iterator over lines.

    Raises:
        The errors of :func:`~aiostage.checkpoint.verify.verify`.
    """
    async for line in _described(source, tree):
        # The author of the file chose names, keys and values, and may have put terminal sequences into them.
        yield "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)


async def _described(source: str, tree: bool) -> AsyncIterator[str]:
    found = await find(source)
    if found is not None:
        async for line in _run(source, found):
            yield line
        return
    storage, name = locate(source)
    outline = await outline_of((storage, name))
    placement = await placement_of(storage, name)
    manifest = outline.manifest
    yield f"{source}: {_counted(manifest.leaves, 'tensor')}, {_size(manifest.nbytes)}"
    for each in outline.files:
        digest = f"{DIGEST_NAME}:{digest_of_parts(each.file.digests)}"
        yield f"  {each.file.name:<40} {_size(each.file.nbytes):>12}  {len(each.records):>6} tensors  {digest}"
        if placement is not None:
            for (other, file), nbytes in Placement({}, {"": placement.files[each.file.name]}).used().items():
                yield f"    {_size(nbytes):>10} in {file if other is None else f'{other}/{file}'}"
    if tree:
        yield ""
        with reading(f"{source}"):
            for line in _tree(outline):
                yield line


async def _run(source: str, found: Found) -> AsyncIterator[str]:
    """Iterate over one line for each checkpoint below a path, with what it refers to."""
    yield f"{source}: {_counted(len(found.names), 'checkpoint')}"
    for name in found.names:
        try:
            yield f"  {name:<24} {await _summary(found.storage, name)}"
        except CheckpointCorruptError as error:
            yield f"  {name:<24} {error}"
    for name in found.removed:
        yield f"  {name:<24} removed; what is left of it lies there for others that refer to it"


async def _summary(storage: Storage, name: str) -> str:
    reader = await open_checkpoint(storage, name)
    try:
        text = bytes(await reader.manifest())
        placement = await reader.placement()
    finally:
        await reader.aclose()
    nbytes, leaves = read_summary(text, path=f"{reader.location}/{MANIFEST_NAME}")
    line = f"{leaves:>8,} tensors  {_size(nbytes):>10}"
    if placement is None or not placement.needs():
        return line
    own = sum(size for (other, _), size in placement.sizes.items() if other is None)
    return f"{line}  {_size(own)} of its own, refers to {', '.join(sorted(placement.needs()))}"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _tree(outline: Outline) -> Iterator[str]:
    """Iterate over one line for each leaf, with its path; a container that is met again is only named."""
    table = outline.table
    pending: list[tuple[str, Any]] = [("", table.root)]
    paths: dict[int, str] = {}
    while pending:
        path, child = pending.pop()
        index = table.node(child)
        if index is None:
            yield f"{path or '.'} = {_short(child)}"
        elif index in paths:
            yield f"{path} is {paths[index] or '.'}"
        else:
            paths[index] = path
            form = table.forms[index]
            if form["is"] in LOOKED_INTO:
                yield f"{path or '.'}: {form['is']} of {sum(1 for _ in table.edges(index))}"
                steps = ((_key(table, key), value) for key, value in table.edges(index))
                below = [(f"{path}.{step}" if path else step, value) for step, value in steps]
                pending += reversed(below)
            else:
                yield f"{path or '.'}: {_leaf(outline, form)}"


def _leaf(outline: Outline, form: dict[str, Any]) -> str:
    if form["is"] != "tensor":
        return f"{form['is']} {_short(form.get('value', form.get('shape', '')))}".rstrip()
    record = outline.records[form["name"]]
    dtype, shape = form.get("dtype", record.dtype), form.get("shape", list(record.shape))
    cls = form.get("class", "tensor")
    shared = "" if "offset" not in form else f", a view of {form['name']}"
    return f"{cls} {dtype} {tuple(shape)} {_size(record.stop - record.start)}{shared}"


def _key(table: NodeTable, key: Any) -> str:
    """Spell out a key, unless it is a container of containers."""
    index = table.node(key)
    if index is None:
        return str(key)
    form, children = table.forms[index], table.children[index]
    if "value" in form:
        return _cut(str(read_scalar(form["is"], form["value"])))
    if form["is"] == "tuple" and all(table.node(child) is None for child in children):
        return _short(tuple(children))
    return f"<{form['is']} {index}>"


def _short(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{nbytes} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
