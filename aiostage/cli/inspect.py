"""The command `inspect`: what a checkpoint consists of."""

from __future__ import annotations

from typing import Any

from aiostage.cli.contents import open_contents
from aiostage.cli.entries import TreeEntry
from aiostage.cli.finding import CheckpointRun, find_checkpoints
from aiostage.cli.listing import list_found
from aiostage.cli.output import Output, counted, shortened, size, without

__all__ = ["inspect"]


async def inspect(source: str, out: Output, *, tree: bool = True) -> None:
    """Describe a checkpoint of any kind, or list those that lie below a path. Elements of tensors are not read.

    Args:
        source: A path or a URL.
        out: Where to print.
        tree: Whether the tree of a checkpoint is described too.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointCorruptError: If it is damaged.
        CheckpointError: If it needs code, or cannot be read here.
        OSError: If the storage refuses.
    """
    found = await find_checkpoints(source)
    if isinstance(found, CheckpointRun):
        await list_found(found, out)
        return
    async with open_contents(found, elements=False) as contents:
        tensors = [entry for entry in contents.entries if entry.kind == "tensor"]
        nbytes = sum({_memory(entry): entry.nbytes for entry in tensors}.values())
        out.data.update(
            source=source, kind=contents.kind, tensors=len(tensors), nbytes=nbytes, files=list(contents.files)
        )
        if contents.left_out:
            out.data["left_out"] = list(contents.left_out)
        kind = f"  ({contents.kind}{without(contents.left_out)})" if contents.kind != "aiostage" else ""
        out.line(f"{source}: {counted(len(tensors), 'tensor')}, {size(nbytes)}{kind}", "bold")
        for file in contents.files:
            line = f"  {file['name']:<40} {size(file['nbytes']):>12}"
            if "digest" in file:
                line += f"  {counted(file['tensors'], 'tensor'):>14}  {file['digest']}"
            out.line(line)
            for piece in file.get("stored_in", ()):
                out.line(f"    {size(piece['nbytes']):>10} in {piece['file']}")
        if tree:
            out.line()
            out.data["tree"] = [_as_json(entry) for entry in contents.entries]
            for entry in contents.entries:
                if not entry.inner:
                    out.line(_described(entry))


def _memory(entry: TreeEntry) -> object:
    """Return a key for the memory of a leaf. Leaves over the same memory have the same key, and count once."""
    return ("view", entry.more["view_of"]) if entry.more and "view_of" in entry.more else entry.path


def _described(entry: TreeEntry) -> str:
    more = entry.more or {}
    if entry.kind == "value":
        return f"{entry.name} = {shortened(entry.text)}"
    if entry.kind == "reference":
        return f"{entry.name} is {entry.text}"
    if entry.kind != "tensor":
        return f"{entry.name}: {shortened(entry.text)}"
    line = f"{entry.name}: {entry.text} {entry.dtype} {entry.shape} {size(entry.nbytes)}"
    if "view_of" in more:
        line += f", a view of {more['view_of']}"
    return line + (f" in {counted(more['chunks'], 'chunk')}" if "chunks" in more else "")


def _as_json(entry: TreeEntry) -> dict[str, Any]:
    found: dict[str, Any] = {"path": list(entry.path), "kind": entry.kind}
    if entry.kind == "tensor":
        about = {"dtype": entry.dtype, "shape": list(entry.shape), "nbytes": entry.nbytes}
        return found | about | dict(entry.more or {})
    return found | {"text": entry.text}
