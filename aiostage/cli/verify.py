"""The command `verify`: checks checkpoints one after the other, and continues after damage."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

from aiostage.cli.checking import check
from aiostage.cli.finding import Place, find_checkpoints
from aiostage.cli.listing import REMOVED
from aiostage.cli.output import Output, counted, few
from aiostage.cli.report import Damage, Report
from aiostage.errors import CheckpointCorruptError, CheckpointError
from aiostage.incremental.reading import is_removed

__all__ = ["verify"]


async def verify(sources: Sequence[str], out: Output, *, progress: bool = False) -> None:
    """Verify all checkpoints, and print what is wrong with each, and a summary if there are several.

    Args:
        sources: Paths and URLs, of checkpoints and of runs.
        out: Where to print. Its status is 1 if anything is damaged, or 3 if anything could not be read at all.
        progress: Show a bar.
    """
    reports: list[Report] = []
    unread = 0
    out.data.update({"checkpoints": [], "removed": [], "unread": []})
    async for source, report in _each(sources, progress):
        if isinstance(report, Report):
            reports.append(report)
            out.data["checkpoints"].append(_as_json(report))
            _print(report, out)
        elif report is None:
            out.data["removed"].append(source)
            out.line(f"{source}: {REMOVED}")
        else:
            unread += 1
            out.data["unread"].append({"source": source, "reason": str(report)})
            out.complain(f"aiostage verify: {report}")
        out.flush()
    damaged = [report for report in reports if report.damage]
    tensors = sum(len({name for each in report.damage for name in each.tensors}) for report in damaged)
    out.data["summary"] = {
        "checkpoints": len(reports) + unread,
        "whole": len(reports) - len(damaged),
        "damaged": len(damaged),
        "unread": unread,
        "tensors_touched": tensors,
    }
    if len(reports) + unread > 1:
        text = f"{counted(len(reports) + unread, 'checkpoint')}: {len(reports) - len(damaged)} whole"
        text += f", {len(damaged)} damaged, with {counted(tensors, 'tensor')} touched" if damaged else ""
        text += f", {unread} not read" if unread else ""
        out.line(text, "bad" if damaged or unread else "good")
    out.status = 1 if damaged else 3 if unread else 0


async def _each(sources: Sequence[str], progress: bool) -> AsyncIterator[tuple[str, Report | Exception | None]]:
    """Iterate over checkpoints, each with its report, with None if it was removed, or with the error of reading it."""
    for source in sources:
        try:
            found = await find_checkpoints(source)
        except (CheckpointError, OSError) as error:
            yield source, await _instead(source, error)
            continue
        if isinstance(found, Place):
            yield source, await _attempt(found, progress)
            continue
        for name in found.names:
            place = f"{source.rstrip('/')}/{name}"
            try:
                at = await found.place(name)
            except (CheckpointError, OSError) as error:
                yield place, await _instead(place, error)
                continue
            yield place, await _attempt(at, progress)


async def _attempt(place: Place, progress: bool) -> Report | Exception | None:
    try:
        if place.read is None and await is_removed(place.storage, place.name):
            # A shell finds it for patterns such as step-*. The checkpoints that refer to its files are checked for
            # themselves, and these files with them.
            return None
        return await check(place, progress=progress)
    except (CheckpointError, OSError) as error:
        return await _instead(place.source, error)


async def _instead(source: str, error: Exception) -> Report | Exception:
    """Return the report or the error for a checkpoint that could not be opened: damage gets a report."""
    if isinstance(error, CheckpointCorruptError):
        return Report(source, "unknown", damage=[Damage(os.path.basename(error.path or source), error.reason)])
    return error


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "source": report.source,
        "kind": report.kind,
        "files": report.files,
        "nbytes": report.nbytes,
        "whole": not report.damage,
        "note": report.note,
        "damage": [
            {
                "file": each.file,
                "reason": each.reason,
                "start": each.start,
                "stop": each.stop,
                "tensors": list(each.tensors),
                "stored_in": list(each.stored_in),
            }
            for each in report.damage
        ],
    }


def _print(report: Report, out: Output) -> None:
    files = f"{counted(report.files, 'file')}, {report.nbytes:,} bytes"
    if not report.damage:
        verdict = "all as they were written" if report.note is None else f"no damage found ({report.note})"
        out.line(f"{report.source}: {files}, {verdict}", "good" if report.note is None else None)
        return
    out.line(f"{report.source}: damaged", "bad")
    for each in report.damage:
        where = f" (stored in {few(each.stored_in)})" if each.stored_in else ""
        out.line(f"  {each.file}: {each.reason}{where}")
        if each.tensors:
            out.line(f"    {'touches' if each.start is not None else 'affects'} {few(each.tensors)}")
