"""The commands `ls` and `du`: the checkpoints of a run, and how many bytes they take."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from anyio.to_thread import run_sync

from aiostage.checkpoint.reader import open_checkpoint
from aiostage.cli.contents import open_contents
from aiostage.cli.finding import CheckpointRun, Place, find_checkpoints
from aiostage.cli.output import Output, age, counted, size, without
from aiostage.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from aiostage.format.manifest import read_head
from aiostage.storage.commit import MANIFEST_NAME
from aiostage.storage.locate import step_of

__all__ = ["REMOVED", "disk_usage", "list_found", "list_run"]

REMOVED = "removed; other checkpoints still refer to its files"


@dataclass(slots=True)
class _Summary:
    """What a listing says of one checkpoint.

    Attributes:
        kind: The program that has written it.
        leaves: How many tensors it has.
        nbytes: Size of the tensors.
        modified: When it was committed, in seconds since 1970; None if the storage does not say.
        own: The files in it, with their sizes.
        others: The files of other checkpoints that it refers to, with their sizes.
        is_incremental: Whether its bytes may lie in other checkpoints, and those of others in it.
    """

    kind: str
    leaves: int
    nbytes: int
    modified: float | None
    own: dict[str, int] = field(default_factory=dict)
    others: dict[tuple[str, str], int] = field(default_factory=dict)
    is_incremental: bool = False


async def list_run(source: str, out: Output) -> None:
    """Print a line for each checkpoint below a path, or for the one at it.

    The status is 1 if one is damaged, else 3 if one of several cannot be read.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If there is something else.
        OSError: If the storage refuses.
    """
    await list_found(await find_checkpoints(source), out)


async def list_found(found: Place | CheckpointRun, out: Output) -> None:
    """Do as :func:`list_run`, with what was found."""
    names = found.names if isinstance(found, CheckpointRun) else [found.name]
    removed = found.removed if isinstance(found, CheckpointRun) else []
    checkpoints: list[dict[str, Any]] = []
    out.data.update(source=found.source, checkpoints=checkpoints, removed=list(removed))
    if isinstance(found, CheckpointRun):
        out.line(f"{found.source}: {counted(len(names), 'checkpoint')}", "bold")
    now = time.time()
    for name in names:
        about: dict[str, Any] = {"name": name, "step": step_of(name.rpartition("/")[2])}
        try:
            summary = await _summary(found if isinstance(found, Place) else await found.place(name))
        except CheckpointCorruptError as error:
            out.line(f"  {name:<24} {error}", "bad")
            out.status = 1
            checkpoints.append(about | {"error": str(error)})
            continue
        except CheckpointNotFoundError:
            # It was removed since it was listed.
            continue
        except (CheckpointError, OSError) as error:
            if isinstance(found, Place):
                raise
            # This one cannot be read here. The others may.
            reason = error.reason if isinstance(error, CheckpointError) else error
            out.line(f"  {name:<24} {reason}", "bad")
            out.status = out.status or 3
            checkpoints.append(about | {"error": str(error)})
            continue
        seconds = None if summary.modified is None else now - summary.modified
        own = sum(summary.own.values())
        refers_to = sorted({other for other, _ in summary.others})
        checkpoints.append(
            about
            | {
                "kind": summary.kind,
                "tensors": summary.leaves,
                "nbytes": summary.nbytes,
                "committed": None if summary.modified is None else _date(summary.modified),
                "age_seconds": None if seconds is None else round(seconds, 3),
                "incremental": summary.is_incremental,
                "own_bytes": own,
                "refers_to": refers_to,
            }
        )
        line = f"  {name:<24} {age(seconds):>8} {counted(summary.leaves, 'tensor'):>16}  {size(summary.nbytes):>10}"
        if summary.kind != "aiostage":
            line += f"  {summary.kind}"
        elif summary.is_incremental:
            line += f"  incremental, {size(own)} of its own"
            line += f", refers to {', '.join(refers_to)}" if refers_to else ""
        out.line(line)
    for name in removed:
        out.line(f"  {name:<24} {REMOVED}")


async def disk_usage(source: str, out: Output) -> None:
    """Print how many bytes the files of a run take, from its manifests, and what its checkpoints share.

    Raises:
        As :func:`list_run`; and CheckpointCorruptError if a manifest is damaged, for then it cannot be known.
    """
    found = await find_checkpoints(source)
    names = list(found.names) if isinstance(found, CheckpointRun) else [found.name]
    summaries: dict[str, _Summary] = {}
    for name in names:
        try:
            summaries[name] = await _summary(found if isinstance(found, Place) else await found.place(name))
        except CheckpointNotFoundError:
            # It was removed since it was listed.
            continue
    files, users = _files(summaries)
    checkpoints: list[dict[str, Any]] = []
    for name in summaries:
        # What it needs may lie in other checkpoints, and its own files may be needed by others. A removal frees only
        # the bytes that no other checkpoint needs.
        needed = [file for file, by in users.items() if name in by]
        nbytes = sum(files[file] for file in needed)
        shared = sum(files[file] for file in needed if len(users[file]) > 1)
        own = sum(length for (at, _), length in files.items() if at == name)
        about = {"name": name, "nbytes": nbytes, "own_bytes": own, "shared_bytes": shared}
        about["freed_bytes"] = nbytes - shared
        checkpoints.append(about)
    # Files of checkpoints that were removed, or lie outside of what was listed.
    kept = sum(nbytes for (at, _), nbytes in files.items() if at not in summaries)
    total = sum(files.values())
    whole = sum(each["nbytes"] for each in checkpoints)
    out.data.update(
        source=found.source,
        total_bytes=total,
        shared_bytes=sum(nbytes for file, nbytes in files.items() if len(users[file]) > 1),
        kept_for_others_bytes=kept,
        without_sharing_bytes=whole,
        checkpoints=checkpoints,
    )
    text = f"{found.source}: {size(total)} in {counted(len(summaries), 'checkpoint')}"
    out.line(text + (f"; they would take {size(whole)} if they shared nothing" if whole > total else ""), "bold")
    for each in checkpoints:
        line = f"  {each['name']:<24} {size(each['nbytes']):>10}"
        if each["shared_bytes"]:
            line += f"  {size(each['shared_bytes'])} of it shared, {size(each['freed_bytes'])} freed if it is removed"
        out.line(line)
    if kept:
        what = "of removed ones" if isinstance(found, CheckpointRun) else "in other checkpoints"
        out.line(f"  {what:<24} {size(kept):>10}  kept for those that refer to them")


def _files(summaries: Mapping[str, _Summary]) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], set[str]]]:
    """Return the size of each file of a run, by checkpoint and name, and the checkpoints that need it."""
    files: dict[tuple[str, str], int] = {}
    users: dict[tuple[str, str], set[str]] = {}
    for name, summary in summaries.items():
        folder = name.rpartition("/")[0]
        own = {(name, file): nbytes for file, nbytes in summary.own.items()}
        # A manifest names other checkpoints of the same run, without the folder of the run.
        others = {
            (f"{folder}/{other}" if folder else other, file): nbytes for (other, file), nbytes in summary.others.items()
        }
        for file, nbytes in (own | others).items():
            files[file] = nbytes
            users.setdefault(file, set()).add(name)
    return files, users


async def _summary(place: Place) -> _Summary:
    """Read the manifest of a checkpoint."""
    if place.read is not None or place.is_dcp:
        return await _summary_of_contents(place)
    reader = await open_checkpoint(place.storage, place.name)
    try:
        await reader.placement()  # refuses one that was removed
        text = await reader.manifest()
        path = f"{reader.location}/{MANIFEST_NAME}"
        manifest = await run_sync(lambda: read_head(text, path=path))
        modified = await reader.modified()
    finally:
        await reader.aclose()
    found = _Summary("aiostage", manifest.leaves, manifest.nbytes, modified, {MANIFEST_NAME: len(text)})
    if manifest.placement is None:
        found.own |= {file.name: file.nbytes for file in manifest.files}
        return found
    found.is_incremental = True
    for (other, file), nbytes in manifest.placement.sizes.items():
        if other is None:
            found.own[file] = nbytes
        else:
            found.others[other, file] = nbytes
    return found


async def _summary_of_contents(place: Place) -> _Summary:
    modified = None
    if place.read is None:
        reader = await place.storage.read(place.name)
        try:
            modified, manifest = await reader.modified(), len(await reader.manifest())
            own = {MANIFEST_NAME: manifest, ".metadata": await reader.size(".metadata")}
        finally:
            await reader.aclose()
    else:
        path = place.read.path
        modified, own = await run_sync(os.path.getmtime, path), {}
        # The file that says where the tensors are.
        index = {"dcp": os.path.join(path, ".metadata"), "shards": path}.get(place.read.kind)
        if index is not None:
            own[os.path.basename(index)] = await run_sync(os.path.getsize, index)
        folder = path if place.read.kind == "dcp" else os.path.dirname(path)
        for name in place.read.left_out:
            own[name] = await run_sync(_size_of, os.path.join(folder, name))
    async with open_contents(place, elements=False) as contents:
        tensors = [entry for entry in contents.entries if entry.kind == "tensor"]
        own |= {file["name"]: file["nbytes"] for file in contents.files}
        kind = contents.kind + without(contents.left_out)
        return _Summary(kind, len(tensors), sum(each.nbytes for each in tensors), modified, own)


def _size_of(path: str) -> int:
    """Return the size of a file, or of the files in a directory."""
    below = [os.path.join(at, name) for at, _, names in os.walk(path) for name in names]
    files = below if os.path.isdir(path) else [path]
    # A link that leads nowhere has no size.
    return sum(os.path.getsize(file) for file in files if os.path.exists(file))


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
