"""Runs one command of ``aiostage``, and turns its errors into messages and exit statuses."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from typing import Any

import anyio

from aiostage.checkpoint.save import convert
from aiostage.cli.bench import bench
from aiostage.cli.diff import diff
from aiostage.cli.inspect import inspect
from aiostage.cli.listing import disk_usage, list_run
from aiostage.cli.output import Output
from aiostage.cli.verify import verify
from aiostage.errors import CheckpointCorruptError, CheckpointExistsError, StagingError

__all__ = ["run"]

_DAMAGED = 1
_FAILED = 3


def run(options: argparse.Namespace) -> int:
    """Run one command.

    Args:
        options: Its arguments, from the parser of ``aiostage_command``.

    Returns:
        The exit status, as that module says.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # The shell has closed it (``>&-``). The next file that is opened would get its number, and our output.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Keys of a tree may have characters that the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    out = Output(as_json=options.json)
    try:
        anyio.run(_run, options, out)
        out.close()
        return out.status
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends. To the broken pipe, that would print another error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except CheckpointCorruptError as error:
        out.complain(f"aiostage {options.command}: {error}")
        return _DAMAGED
    except (StagingError, OSError, ValueError, ImportError, MemoryError) as error:
        out.complain(f"aiostage {options.command}: {str(error) or type(error).__name__}")
        return _FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


async def _run(options: argparse.Namespace, out: Output) -> None:
    match options.command:
        case "ls":
            await list_run(options.source, out)
        case "du":
            await disk_usage(options.source, out)
        case "inspect":
            await inspect(options.source, out, tree=not options.files)
        case "verify":
            await verify(options.sources, out, progress=options.progress)
        case "diff":
            await diff(options.first, options.second, out, values=not options.no_values)
        case "convert":
            await _convert(options, out)
        case _:
            await bench(options.mebibytes << 20, options.tensors, options.rounds, out)


async def _convert(options: argparse.Namespace, out: Output) -> None:
    try:
        info: Any = await convert(
            options.source, options.target, overwrite=options.overwrite, duplicate_tied=options.duplicate_tied
        )
    except CheckpointExistsError as error:
        if not options.overwrite:
            error.remedy = "Choose another target or pass --overwrite."
        raise
    out.data.update(location=info.location, tensors=info.leaves, nbytes=info.nbytes, files=list(info.files))
    out.line(f"{info.location}: {info.leaves} tensors, {info.nbytes:,} bytes")
