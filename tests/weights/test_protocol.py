"""What is sent over the socket, by peers that are not of aiostage too; and the socket's file."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from aiostage import CheckpointCorruptError, WeightsError
from aiostage.weights import WeightPublisher, WeightSubscriber, sockets
from aiostage.weights.description import describe
from aiostage.weights.sockets import MAX_PACKET_BYTES, Endpoint, PacketSocket, connect
from tests.descriptors import SHARED_MEMORY, SOCKETS, opened
from tests.weights.trees import until, weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create and /proc")

HELLO = {"aiostage": "weights", "protocol": 1, "timeout": 60, "have": None}


def descriptors(*others: str) -> set[tuple[str, str]]:
    """Return the descriptors that a connection may leave, and those of other names."""
    return opened((*SOCKETS, *SHARED_MEMORY, *others))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "weights.sock")


@contextmanager
def peer(path: str) -> Iterator[socket.socket]:
    """Connect without any of aiostage's code."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(20)
        connection.connect(path)
        yield connection


def received(connection: socket.socket) -> list[dict[str, Any]]:
    """Return all packets up to the end of the connection."""
    found = []
    while data := connection.recv(1 << 16):
        found.append(json.loads(data))
    return found


PACKETS = {
    "no JSON": [b"\x80\x04K\x01."],
    "no object": [b"[1]"],
    "too deep": [b"[" * MAX_PACKET_BYTES],
    "too long": [b" " * (MAX_PACKET_BYTES + 1)],
    "a member twice": [b'{"aiostage":"weights","aiostage":"weights"}'],
    "no number": [b'{"aiostage":"weights","protocol":NaN}'],
    "another program": [{"jsonrpc": "2.0"}],
    "another version": [HELLO | {"protocol": 2}],
    "no timeout": [HELLO | {"timeout": 0}],
    "an endless timeout": [HELLO | {"timeout": 1e300}],
    "no version": [HELLO | {"have": ["epoch", -1]}],
    "no epoch": [HELLO | {"have": [1, 1]}],
    "an unknown packet": [HELLO, {"give": 1}],
    "asking twice": [HELLO, {"next": None}, "version", {"next": None}, {"next": None}],
    "releasing what it does not hold": [HELLO, {"released": 0}],
    "releasing twice": [HELLO, {"next": None}, "version", {"released": 0}, {"released": 0}],
    "acknowledging what it was not sent": [HELLO, {"acknowledged": 0}],
    "a large number": [HELLO, {"released": 1 << 64}],
    "hello twice": [HELLO, HELLO],
}


@pytest.mark.asyncio
class TestPublisher:
    @pytest.mark.parametrize("packets", PACKETS.values(), ids=PACKETS)
    async def test_malformed_peers_are_refused_and_others_served(
        self, path: str, packets: list[Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        def talk() -> list[dict[str, Any]]:
            with peer(path) as connection:
                for packet in packets:
                    if packet == "version":
                        while json.loads(connection.recv(1 << 16)).get("version") is None:
                            pass
                    else:
                        connection.send(packet if isinstance(packet, bytes) else json.dumps(packet).encode())
                return received(connection)

        async with WeightPublisher(path) as publisher:
            await publisher.publish(weights(0), version=0)
            before = descriptors()
            answers = await asyncio.to_thread(talk)
            assert "refused" in answers[-1], answers
            assert f"subscriber {os.getpid()} of {path} was refused: it sent " in caplog.text
            await until(lambda: publisher.subscribers == ())
            assert publisher.versions == (0,)
            await until(lambda: not descriptors() - before)
            async with WeightSubscriber(path) as subscriber:
                assert (await subscriber.get()).version == 0

    async def test_descriptors_of_peers_are_closed(self, path: str) -> None:
        def talk(count: int) -> list[dict[str, Any]]:
            with peer(path) as connection:
                socket.send_fds(connection, [json.dumps(HELLO).encode()], [0] * count)
                return received(connection)

        async with WeightPublisher(path) as publisher:
            before = descriptors()
            for count in (1, 2, 5):
                assert "refused" in (await asyncio.to_thread(talk, count))[-1]
            await until(lambda: not descriptors() - before)
            assert publisher.subscribers == ()

    async def test_silent_peers_are_left(self, path: str) -> None:
        async with WeightPublisher(path, timeout=0.05):
            with peer(path) as connection:
                assert await asyncio.to_thread(received, connection) == []

    async def test_what_came_while_this_process_computed_counts_as_heard(self) -> None:
        """A training step on the event loop may take longer than the timeout: both are due then."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        peer = PacketSocket(ours)
        with theirs:
            with pytest.raises(TimeoutError, match="silent for 0 seconds"):
                await peer.receive_within(0)
            theirs.send(b'{"alive":true}')
            assert await peer.receive_within(0) == ({"alive": True}, [])
        peer.close()

    async def test_it_goes_on_after_it_could_not_accept(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        accept, failures = Endpoint.accept, [OSError(24, "Too many open files")]

        async def fail(endpoint: Endpoint) -> PacketSocket:
            if failures:
                raise failures.pop()
            return await accept(endpoint)

        monkeypatch.setattr(Endpoint, "accept", fail)
        async with WeightPublisher(path) as publisher, WeightSubscriber(path) as subscriber:
            await publisher.publish(weights(0))
            assert (await subscriber.get()).version == 0
            assert not failures

    async def test_a_peer_that_does_not_read_holds_up_no_others(self, path: str) -> None:
        async with WeightPublisher(path) as publisher, WeightSubscriber(path) as subscriber:
            with peer(path) as connection:
                connection.send(json.dumps(HELLO).encode())
                for number in range(400):
                    await publisher.publish({"step": number}, version=number)
                assert (await subscriber.get()).version == 399
                assert len(publisher.versions) == 1

    async def test_processes_of_other_users_are_refused(self) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root has processes of other users")
        program = f"""
import os, socket, sys
os.umask(0)
theirs = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
theirs.bind(sys.argv[2])
theirs.listen()
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
try:
    connection.connect(sys.argv[1])
except PermissionError:
    print("no permission", flush=True)
sys.stdin.readline()
connection.connect(sys.argv[1])
connection.send(b'{json.dumps(HELLO)}')
print(connection.recv(4096).decode(), flush=True)
sys.stdin.readline()
"""
        with tempfile.TemporaryDirectory() as directory:
            os.chmod(directory, 0o777)
            path, other = f"{directory}/ours", f"{directory}/theirs"
            async with WeightPublisher(path) as publisher:
                # The permissions would do.
                assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
                start = partial(
                    subprocess.Popen,
                    ["/usr/bin/env", "python3", "-c", program, path, other],
                    user=65534,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                try:
                    process = await asyncio.to_thread(start)
                except OSError as error:
                    pytest.skip(f"no process of another user: {error}")
                with process:
                    assert await asyncio.to_thread(process.stdout.readline) == "no permission\n"
                    # So does the kernel's word on who connects.
                    os.chmod(path, 0o666)
                    process.stdin.write("\n")
                    process.stdin.flush()
                    assert "a request as user 65534" in await asyncio.to_thread(process.stdout.readline)
                    assert publisher.subscribers == ()
                    async with WeightSubscriber(other) as subscriber:
                        with pytest.raises(WeightsError, match=r"listens there as user 65534.*run as one user"):
                            await subscriber.get()
                    process.stdin.close()


@pytest.mark.asyncio
class TestSubscriber:
    @asynccontextmanager
    async def publishing(self, path: str, *answers: tuple[dict[str, Any], list[int]]) -> AsyncIterator[list[int]]:
        """Listen, and answer each subscriber's request with the same packets."""
        endpoint = await asyncio.to_thread(Endpoint, path)
        served = [0]

        async def serve() -> None:
            while True:
                peer = await endpoint.accept()
                served[0] += 1
                try:
                    await peer.receive()
                    await peer.send(HELLO | {"epoch": "e"})
                    while (await peer.receive())[0] != {"next": None}:
                        pass
                    for message, sent in answers:
                        await peer.send(message, sent)
                    while True:
                        await peer.receive()
                except (EOFError, OSError):
                    peer.close()

        serving = asyncio.create_task(serve())
        try:
            yield served
        finally:
            serving.cancel()
            await asyncio.wait([serving])
            await asyncio.to_thread(endpoint.close)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"digest": "0"}, "does not match its digest"),
            ({"text_bytes": 1 << 62}, "no sizes"),
            ({"text_bytes": None}, "no sizes"),
            ({"file_bytes": 1 << 40}, "its text has"),
            ({"memory_bytes": 0}, "2 descriptors"),
            ({"memory_bytes": 1 << 40}, "mmap length is greater than file size"),
            ({"memory_bytes": 4096}, "exceeds its memory"),
        ],
    )
    async def test_what_describes_no_weights_is_an_error(self, path: str, change: dict[str, Any], match: str) -> None:
        async with WeightPublisher(path) as publisher:
            await publisher.publish(weights(0))
            staged = publisher._sender._newest.staged
            described = await asyncio.to_thread(describe, staged)
        good = {"version": 1} | described.message()
        sent = list(described.descriptors)
        async with self.publishing(path, (good | change, sent)), WeightSubscriber(path) as subscriber:
            with pytest.raises(CheckpointCorruptError, match=match):
                await subscriber.get()
        async with self.publishing(path, (good, sent)), WeightSubscriber(path) as subscriber:
            assert torch.equal((await subscriber.get()).state_dict["layer0"], staged["layer0"])

    @pytest.mark.parametrize("message", [{"version": -1}, {"give": 1}, {"newest": "1"}])
    async def test_a_publisher_that_sends_something_else_is_left_and_tried_again(
        self, path: str, message: dict[str, Any]
    ) -> None:
        async with self.publishing(path, (message, [0])) as served, WeightSubscriber(path) as subscriber:
            waiting = asyncio.create_task(subscriber.get())
            await until(lambda: served[0] >= 2)
            received = os.readlink("/proc/self/fd/0")
            before = len(descriptors(received))
            await until(lambda: served[0] >= 4)
            await until(lambda: len(descriptors(received)) <= before)
            assert not waiting.done()
            waiting.cancel()

    async def test_a_refusal_is_raised(self, path: str) -> None:
        async with WeightSubscriber(path) as subscriber:
            waiting = asyncio.create_task(subscriber.get())
            endpoint = await asyncio.to_thread(Endpoint, path)
            peer = await endpoint.accept()
            await peer.send({"refused": "it was sent version 1 of the protocol; this end has 2"})
            with pytest.raises(WeightsError, match=r"process \d+ refused this subscriber: .*this end has 2"):
                await waiting
            peer.close()
            await asyncio.to_thread(endpoint.close)

    async def test_a_directory_of_another_user_is_said(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: str) -> tuple[int, str]:
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(sockets, "_open_directory", refuse)
        async with WeightSubscriber(path) as subscriber:
            with pytest.raises(WeightsError, match="this process may not connect: Permission denied"):
                await subscriber.get()

    async def test_another_kind_of_socket_is_said(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.bind(path)
            other.listen()
            async with WeightSubscriber(path) as subscriber:
                with pytest.raises(WeightsError, match="another program listens there"):
                    await subscriber.get()


class TestEndpoint:
    def test_two_publishers_at_one_path(self, path: str) -> None:
        endpoint = Endpoint(path)
        before = descriptors(os.path.dirname(path))
        with pytest.raises(WeightsError, match=f"{path}: process {os.getpid()} publishes there"):
            Endpoint(path)
        assert not descriptors(os.path.dirname(path)) - before
        endpoint.close()
        assert os.listdir(os.path.dirname(path)) == []
        Endpoint(path).close()

    def test_what_a_killed_publisher_has_left_is_replaced(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
            stale.bind(path)
        Path(f"{path}.lock").write_text("123456789")
        endpoint = Endpoint(path)
        connect(path).close()
        endpoint.close()

    def test_what_is_no_socket_stays(self, path: str) -> None:
        Path(path).write_text("precious")
        before = descriptors(os.path.dirname(path))
        with pytest.raises(WeightsError, match="exists and is not a socket"):
            Endpoint(path)
        assert Path(path).read_text() == "precious"
        assert not descriptors(os.path.dirname(path)) - before

    def test_long_paths_and_new_directories(self, tmp_path: Path) -> None:
        path = tmp_path.joinpath(*["directory" * 5] * 5) / "weights.sock"
        endpoint = Endpoint(str(path))
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        connect(str(path)).close()
        endpoint.close()

    def test_a_child_keeps_nothing_open(self, path: str) -> None:
        endpoint = Endpoint(path)
        ours = connect(path)
        theirs = PacketSocket(endpoint._socket.accept()[0])
        with warnings.catch_warnings():
            # Newer Pythons warn of every fork beside threads.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os._exit(any(each.fileno() >= 0 for each in (endpoint._socket, ours._socket, theirs._socket)))
        assert os.waitpid(child, 0)[1] == 0
        assert ours.send_nowait({"alive": True})
        ours.close()
        theirs.close()
        endpoint.close()
