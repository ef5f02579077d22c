"""Compares checkpoints of other programs with the checksums that they have, and names the tensors that are damaged."""

from __future__ import annotations

import errno
import io
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from anyio.to_thread import run_sync

from aiostage.checkpoint.foreign import DAMAGED_ARCHIVE, Read
from aiostage.checkpoint.foreign_dcp import DcpDirectory, open_regular
from aiostage.cli.contents import open_contents
from aiostage.cli.entries import entries_of_tree
from aiostage.cli.finding import Place
from aiostage.cli.report import Damage, Report
from aiostage.errors import CheckpointCorruptError, CheckpointError, listed
from aiostage.format.parts import PART_BYTES

__all__ = ["check_foreign"]

_NO_CHECKSUMS = "safetensors has no checksums; the headers are well-formed, and the files as long as they say"
_CRC_ONLY = "PyTorch's format: compared with the CRC-32 of each record of its archives; nothing else has a checksum"
_NOTHING_TO_COMPARE = "PyTorch's format before archives has no checksums; it can be unpickled"


async def check_foreign(place: Place, read: Read) -> Report:
    """Check a checkpoint of another program, as far as its format allows."""
    report = await _check_part(place, read)
    if read.left_out:
        report.note = f"{report.note}; not looked at: {listed(read.left_out)}"
    return report


async def _check_part(place: Place, read: Read) -> Report:
    report = Report(place.source, read.kind)
    try:
        if read.kind == "dcp":
            report.kind, report.note = "torch.distributed.checkpoint", _CRC_ONLY
            await run_sync(_check_dcp_directory, read.path, report)
            return report
        if read.kind == "torch":
            # torch.save has written zip archives since PyTorch 1.6. Older files are plain pickles.
            is_archive = await run_sync(zipfile.is_zipfile, read.path)
            report.kind, report.note = "torch.save", _CRC_ONLY if is_archive else _NOTHING_TO_COMPARE
            report.files, report.nbytes = 1, await run_sync(os.path.getsize, read.path)
            if is_archive:
                report.damage += await run_sync(_check_archive, read.path)
                if report.damage:
                    return report
        async with open_contents(place, elements=False) as contents:
            if read.kind != "torch":
                report.kind, report.note = contents.kind, _NO_CHECKSUMS
                report.files, report.nbytes = len(contents.files), sum(file["nbytes"] for file in contents.files)
    except CheckpointCorruptError as error:
        report.damage.append(Damage(os.path.basename(error.path or read.path), error.reason))
    except CheckpointError:
        # It needs code to be read. An archive was compared before that; of other files, nothing is known.
        if report.note != _CRC_ONLY:
            raise
    return report


def _check_dcp_directory(path: str, report: Report) -> None:
    """Check the records of a directory of ``torch.distributed.checkpoint``, each of which is an archive. Blocks."""
    directory = DcpDirectory(path)
    places = {name: directory.places(name) for name in directory.entries}
    files = {file for found in places.values() for file, _, _ in found}
    report.files = len(files) + 1
    report.nbytes = sum(
        os.path.getsize(file) for file in {*files, os.path.join(path, ".metadata")} if os.path.exists(file)
    )
    for name, found in places.items():
        wrong = [damage for each in found if (damage := _wrong_record(name, *each)) is not None]
        report.damage += wrong
        if not wrong:
            # The bytes are as they were written. Whether they can be read is another question.
            try:
                directory.value(name)
            except CheckpointCorruptError as error:
                report.damage.append(Damage(os.path.basename(error.path or path), error.reason, tensors=[name]))
            except CheckpointError:
                # It needs code to be read. Its bytes match their checksum.
                continue


def _wrong_record(name: str, file: str, start: int, nbytes: int) -> Damage | None:
    base, stop = os.path.basename(file), start + nbytes
    try:
        with open_regular(file) as opened:
            opened.seek(start)
            data = io.BytesIO(opened.read(nbytes))
    except CheckpointCorruptError as error:
        return Damage(base, error.reason, start, stop, [name])
    if data.getbuffer().nbytes < nbytes:
        return Damage(base, f"it ends before byte {stop}.", start, stop, [name])
    if zipfile.is_zipfile(data) and _wrong_in(data):
        return Damage(base, f"bytes {start} to {stop} do not match their CRC-32.", start, stop, [name])
    return None


def _check_archive(path: str) -> list[Damage]:
    """Check a file of ``torch.save``. Blocks."""
    wrong = _wrong_in(path)
    tensors = _tensors_in(path, wrong) if wrong else {}
    return [
        Damage(os.path.basename(path), f"{name} in it does not match its CRC-32.", start, stop, tensors.get(name, ()))
        for name, (start, stop) in wrong.items()
    ]


def _wrong_in(file: Any) -> dict[str, tuple[int, int]]:
    """Return the members of an archive that do not match their CRC-32, with the bytes that they take."""
    found: dict[str, tuple[int, int]] = {}
    try:
        archive = zipfile.ZipFile(file)
    except DAMAGED_ARCHIVE:
        # The directory of the archive. Messages put "in it does not match its CRC-32" after the name.
        return {"the list of what is": (0, 0)}
    with archive:
        for info in archive.infolist():
            if not _is_whole(archive, info):
                found[info.filename] = (info.header_offset, info.header_offset + info.compress_size)
    return found


def _is_whole(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    """Return whether a member of an archive matches its CRC-32, which zipfile compares when it reads the last byte."""
    try:
        with archive.open(info) as member:
            while member.read(PART_BYTES):
                pass
    except DAMAGED_ARCHIVE as error:
        # A disk that cannot read some bytes has damaged them. Other errors of the system say nothing about the bytes.
        if isinstance(error, OSError) and error.errno != errno.EIO:
            raise
        return False
    return True


def _tensors_in(path: str, wrong: Mapping[str, object]) -> dict[str, list[str]]:
    """Return the tensors over damaged members of an archive, as far as they can be told."""
    with zipfile.ZipFile(path) as archive:
        data = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size]
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        # More than elements of tensors is damaged. The report then names the members only.
        return {}
    over: dict[int, list[str]] = {}
    for entry in entries_of_tree(tree):
        # Empty storages have no member with bytes.
        if entry.kind == "tensor" and entry.source.untyped_storage().nbytes():
            over.setdefault(entry.source.untyped_storage().data_ptr(), []).append(entry.name)
    # The file is mapped, so the storages are in memory in the order of their members in the file.
    members = sorted(data, key=lambda info: info.header_offset)
    if len(members) != len(over):
        return {}
    return {info.filename: over[at] for info, at in zip(members, sorted(over), strict=True) if info.filename in wrong}
