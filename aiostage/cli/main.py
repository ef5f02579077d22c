"""The command line: which command, with which arguments, and what becomes of errors."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

import anyio

from aiostage.abc import Storage
from aiostage.checkpoint.resolving import is_removed
from aiostage.checkpoint.save import convert
from aiostage.checkpoint.verify import verify
from aiostage.cli.bench import bench
from aiostage.cli.finding import find
from aiostage.cli.inspect import inspect
from aiostage.errors import StagingError, shown
from aiostage.storage.locate import locate

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: As a shell passes them, without the program; None for those of the process.

    Returns:
        The exit status: 0 if all is well, 1 if it is not, with the reason on stderr; as from the signal if it was
        interrupted, or if the reader of its output has stopped.
    """
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A tree may have any text in it, also what the terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    try:
        anyio.run(options.run, options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (StagingError, OSError, ValueError, ImportError) as error:
        print(f"aiostage {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aiostage", description="Look at checkpoints, and at how fast staging is here."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    look = commands.add_parser("inspect", help="print the tree, the tensors and the files of a checkpoint")
    look.add_argument("source", help="a path, or a URL such as s3://bucket/runs/7; also of a run, to see what it has")
    look.add_argument("--files", action="store_true", help="print the files only, not the tree")
    look.set_defaults(run=_inspect)
    check = commands.add_parser("verify", help="compare every byte of checkpoints with their checksums")
    check.add_argument(
        "sources", nargs="+", metavar="source", help="a path, or a URL such as s3://bucket/runs/7; also of a run"
    )
    check.add_argument("--progress", action="store_true", help="show a bar (needs tqdm)")
    check.set_defaults(run=_verify)
    change = commands.add_parser("convert", help="make a checkpoint of aiostage from one of another program")
    change.add_argument("source", help="a file of torch.save, Lightning or safetensors, or a directory; also of DCP")
    change.add_argument("target", help="the checkpoint to make: a path, or a URL such as s3://bucket/runs/7")
    change.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    change.set_defaults(run=_convert)
    measure = commands.add_parser("bench", help="measure staging on this machine")
    measure.add_argument("--mebibytes", type=_positive, default=512, help="size of the state dict (512)")
    measure.add_argument("--tensors", type=_positive, default=64, help="how many tensors it has (64)")
    measure.add_argument("--rounds", type=_positive, default=5, help="how often it is staged (5)")
    measure.set_defaults(run=_bench)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number above 0")
    return int(text)


async def _inspect(options: argparse.Namespace) -> None:
    async for line in inspect(options.source, tree=not options.files):
        print(line)


async def _verify(options: argparse.Namespace) -> None:
    for source in options.sources:
        found = await find(source)
        if found is None:
            await _verify_one(source, locate(source), options.progress)
        else:
            for name in found.names:
                await _verify_one(f"{source}/{name}", (found.storage, name), options.progress)


async def _verify_one(source: str, place: tuple[Storage, str], progress: bool) -> None:
    if await is_removed(*place):
        # Shells find it for patterns such as step-*. Its files are read for the checkpoints that refer to them.
        print(f"{source}: removed; what is left of it lies there for others that refer to it")
        return
    outline = await verify(place, progress=progress)
    nbytes = sum(file.file.nbytes for file in outline.files)
    files = "1 file" if len(outline.files) == 1 else f"{len(outline.files)} files"
    print(f"{source}: {files}, {nbytes:,} bytes, all as they were written")


async def _convert(options: argparse.Namespace) -> None:
    info = await convert(options.source, options.target, overwrite=options.overwrite)
    print(f"{info.location}: {info.leaves} tensors, {info.nbytes:,} bytes")


async def _bench(options: argparse.Namespace) -> None:
    async for line in bench(options.mebibytes << 20, options.tensors, options.rounds):
        print(line)
