"""What the processes of the tests of shared memory run."""

from __future__ import annotations

import pickle
import sys
from multiprocessing.connection import Connection

from aiostage._memory.shared import SharedHandle


def report_sum(handle: SharedHandle, connection: Connection) -> None:
    """Open a handle, send the sum of its bytes, then the error of opening it once more."""
    memory = handle.open()
    connection.send(int(memory.sum()))
    connection.recv()
    connection.send(int(memory.sum()))
    try:
        handle.open()
    except Exception as error:
        connection.send(error)
    else:
        connection.send(None)


def main() -> None:
    """Open the handle that comes in on standard input, and report its sum as often as a line is sent."""
    memory = pickle.loads(bytes.fromhex(sys.stdin.readline())).open()
    while True:
        print(int(memory.sum()), flush=True)
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    main()
