"""Programs in processes of their own that find PyTorch and aiostage imported: forks of a process that did it once.

Importing takes two seconds of a processor, and a hundred tests start programs. ``[*PYTHON, "-c", PROGRAM]`` runs as
``[sys.executable, "-c", PROGRAM]`` does: with these arguments, environment, folder and descriptors, with the same exit
status, and it ends when what was started is killed. It is a fork, though: what is about a new interpreter, its imports,
options or memory, takes ``sys.executable``.

What takes the path of an interpreter gets that of `executable`. `multiprocessing` has it: the processes that it spawns,
and its fork server, begin in the same way.

The command starts a small process without imports. It sends its arguments and descriptors to the process that has
imported everything, which forks, and waits for the exit status that comes back.
"""

from __future__ import annotations

import contextlib
import io
import marshal
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

__all__ = ["PYTEST", "PYTHON", "begin", "executable", "imported"]

PYTHON = [sys.executable, "-I", "-S", __file__]
"""Takes the place of ``sys.executable`` in a command. With options that are not for it, it starts a new process."""

_OPTIONS = ("-B", "-c", "-m", "-u")

PYTEST = ["-m", "pytest", "-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
"""What follows `PYTHON` to run tests: pytest cannot rewrite the assertions of plugins that are imported before it."""

_ADDRESS = "AIOSTAGE_TESTS_WARM"
_STREAMS = (0, 1, 2)
_MOST_DESCRIPTORS = 64


def begin() -> None:
    """Start the process that imports, which lives as long as this one, and let `PYTHON` find it.

    Where the kernel does not tell of the end of a process (macOS), programs are new processes. Tests that a test starts
    use the process that this one has found.
    """
    if not hasattr(os, "pidfd_open") or _ADDRESS in os.environ:
        return
    import atexit
    import multiprocessing

    os.environ[_ADDRESS], end = _start()
    atexit.register(end)
    multiprocessing.set_executable(executable())


def executable() -> str:
    """Return the path of a program that does what `PYTHON` does, for what is given the path of an interpreter."""
    address = os.environ.get(_ADDRESS)
    return sys.executable if address is None else os.path.join(os.path.dirname(address), "python")


@contextlib.contextmanager
def imported(*modules: str) -> Iterator[None]:
    """Let `PYTHON` find a process that has imported more modules, until the block ends."""
    if not hasattr(os, "pidfd_open"):
        yield
        return
    before = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS], end = _start(*modules)
    try:
        yield
    finally:
        del os.environ[_ADDRESS]
        if before is not None:
            os.environ[_ADDRESS] = before
        end()


def _start(*modules: str) -> tuple[str, Callable[[], None]]:
    """Start a process that imports, and return where it listens and what ends it."""
    import shlex
    import shutil
    import subprocess
    import tempfile
    from pathlib import Path

    # Not a TemporaryDirectory, which removes its folder when it is freed: from Python 3.13 on, multiprocessing clears
    # atexit in a child that it forks, and so frees `end` there, with all that it refers to.
    folder = tempfile.mkdtemp(prefix="warm-")
    owner = os.getpid()
    address = os.path.join(folder, "socket")
    program = Path(folder, "python")
    program.write_text(f'#!/bin/sh\nexec {shlex.join(PYTHON)} "$@"\n')
    program.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", "serve", str(listener.fileno()), *modules],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
        )

    def end() -> None:
        if os.getpid() == owner:
            process.communicate()
            shutil.rmtree(folder)

    return address, end


def _launch() -> int:
    """Have the arguments run, and return how that ended."""
    if sys.argv[1].startswith("-") and sys.argv[1] not in _OPTIONS:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    given = _open_descriptors()
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.environ[_ADDRESS])
        except (KeyError, OSError):
            os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
        request = marshal.dumps((sys.argv[1:], dict(os.environ), os.getcwd(), given))
        socket.send_fds(connection, [len(request).to_bytes(8, "little")], given)
        connection.sendall(request)
        # What is not open here does not keep the other end of a pipe waiting.
        for number in given:
            os.close(number)
        return int(connection.recv(16) or b"1")


def _open_descriptors() -> list[int]:
    """Return the numbers of the standard streams, and of all that was passed besides."""
    found = list(_STREAMS)
    for number in map(int, os.listdir("/proc/self/fd")):
        # One of them is that of the listing, and no longer open.
        with contextlib.suppress(OSError):
            if number > _STREAMS[-1]:
                os.fstat(number)
                found.append(number)
    return found


def _end_as(status: int) -> None:
    """End with an exit status, or by the signal that it says."""
    if status < 0:
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


_Request = tuple[list[str], dict[str, str], str, list[int]]


def _serve(listener: socket.socket) -> _Request | None:
    """Fork for each connection until standard input ends. Returns in each child what it is to run.

    A child's exit status goes to its connection. The end of a connection kills its child.
    """
    import select

    poll = select.poll()
    for descriptor in (0, listener.fileno()):
        poll.register(descriptor, select.POLLIN)
    connections: dict[int, tuple[socket.socket, int]] = {}
    children: dict[int, int] = {}
    while True:
        # Ends come before what begins.
        for descriptor, _ in sorted(poll.poll(), key=lambda found: found[0] == listener.fileno()):
            if descriptor == 0:
                for _, child in connections.values():
                    os.kill(child, signal.SIGKILL)
                return None
            if descriptor == listener.fileno():
                connection, _ = listener.accept()
                request, received = _receive(connection)
                child = os.fork() if request is not None else 0
                if child == 0 and request is not None:
                    # Sockets close their numbers when they are freed, and those are others' numbers by then.
                    for held in (listener, connection, *(held for held, _ in connections.values())):
                        held.detach()
                    _place(received, request[3])
                    return request
                for number in received:
                    os.close(number)
                if child:
                    watched = os.pidfd_open(child)
                    children[watched] = connection.fileno()
                    connections[connection.fileno()] = connection, child
                    poll.register(watched, select.POLLIN)
                    poll.register(connection.fileno(), select.POLLIN)
            elif descriptor in children:
                connection, child = connections.pop(children.pop(descriptor))
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                poll.unregister(descriptor)
                os.close(descriptor)
                with contextlib.suppress(KeyError):
                    poll.unregister(connection.fileno())
                with contextlib.suppress(OSError):
                    connection.sendall(b"%d" % status)
                connection.close()
            elif descriptor in connections:
                # Ended before the next program begins: the process that killed the command relies on that.
                child = connections[descriptor][1]
                os.kill(child, signal.SIGKILL)
                os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
                poll.unregister(descriptor)


def _receive(connection: socket.socket) -> tuple[_Request | None, list[int]]:
    """Return what is to be run, or None if who asked is gone, and the descriptors for it."""
    length, received, _, _ = socket.recv_fds(connection, 8, _MOST_DESCRIPTORS)
    request = b""
    while length and len(request) < int.from_bytes(length, "little"):
        data = connection.recv(1 << 20)
        if not data:
            break
        request += data
    whole = bool(length) and len(request) == int.from_bytes(length, "little")
    return marshal.loads(request) if whole else None, list(received)


def _place(received: list[int], numbers: list[int]) -> None:
    """Give descriptors the numbers that they have where they come from, and close all others."""
    import fcntl

    # First out of the way: a number may be that of another one that has come.
    free = max(1 << 10, *numbers) + 1
    aside = [fcntl.fcntl(number, fcntl.F_DUPFD, free) for number in received]
    os.closerange(3, free)
    for number, descriptor in zip(numbers, aside, strict=True):
        os.dup2(descriptor, number)
    os.closerange(free, free + (1 << 16))


def _run(arguments: list[str], environment: dict[str, str], folder: str, _: list[int]) -> None:
    """Run ``-c PROGRAM ...``, ``-m MODULE ...`` or ``SCRIPT ...`` as the main program of this process."""
    import runpy
    import types

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if "OMP_NUM_THREADS" in environment:
        # It is read when PyTorch is imported, which was before.
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    while arguments[0] in ("-B", "-u"):
        if arguments.pop(0) == "-u":
            # As the interpreter does it: over the file itself, without the buffer in between.
            for name in ("stdout", "stderr"):
                old = getattr(sys, name)
                raw = io.FileIO(old.fileno(), "w", closefd=False)
                setattr(sys, name, io.TextIOWrapper(raw, old.encoding, old.errors, write_through=True))
    if arguments[0] not in ("-c", "-m"):
        sys.argv[:] = arguments
        sys.path[0] = os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")
        return
    how, what, *sys.argv[1:] = arguments
    sys.path[0] = ""
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    sys.argv[0] = "-c"
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        import gc
        import importlib

        for module in ("aiostage", *sys.argv[3:]):
            importlib.import_module(module)

        # The collector of a child passes over what it would otherwise have to copy, when it ends at the latest.
        gc.collect()
        gc.freeze()
        asked = _serve(socket.socket(fileno=int(sys.argv[2])))
        if asked is not None:
            _run(*asked)
    else:
        _end_as(_launch())
