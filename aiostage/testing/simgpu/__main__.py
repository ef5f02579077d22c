"""Run a command in a process that has the device: ``python -m aiostage.testing.simgpu [--if-possible] COMMAND...``."""

from __future__ import annotations

import os
import shutil
import sys

from aiostage.testing.simgpu.building import UnavailableError, build, environment

_USAGE = (
    "usage: python -m aiostage.testing.simgpu [--if-possible] COMMAND...\n\n"
    "Build the simulated PyTorch device if need be, and run a command that has it. With --if-possible it is no\n"
    "failure that it cannot be built here: the reason is printed, and the command is not run."
)


def main(arguments: list[str]) -> int:
    """Run the command in place of this process; return an exit status if there is nothing to run."""
    if_possible = arguments[:1] == ["--if-possible"]
    command = arguments[if_possible:]
    if not command or command[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if command else 2
    try:
        folder = build()
    except UnavailableError as error:
        print(
            f"{'skipped' if if_possible else 'error'}: the simulated device is not available: {error}", file=sys.stderr
        )
        return 0 if if_possible else 1
    program = shutil.which(command[0])
    if program is not None:
        os.execve(program, command, environment(folder))
    print(f"error: there is no program {command[0]!r}", file=sys.stderr)
    return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
