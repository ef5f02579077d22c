"""Bad days: after each of them a save has succeeded by retry or failed with a clear error, and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import secrets
import weakref
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import obstore
import pytest
from obstore.store import S3Store

from aiostage import CheckpointError, CheckpointExistsError, CheckpointNotFoundError, StorageError
from aiostage.storage import ObjectStorage
from tests.servers.proxy import Fault, FaultProxy, Kind, running_proxy
from tests.servers.s3 import open_uploads
from tests.servers.weed import BUCKET, S3Server
from tests.storage.buckets import content, save, some_bytes, write

pytestmark = pytest.mark.asyncio

BEGIN = r"^POST .*\?uploads"
SEND = r"^PUT .*partNumber="
COMPLETE = r"^POST .*\?uploadId="
OPEN = r"^GET .*\?uploads="
ABORT = r"^DELETE .*\?uploadId="
SMALL = r"^PUT .*/small$"
MANIFEST = r"^PUT .*/manifest.json$"
POINTER = r"^PUT .*/checkpoint.json$"

PART = 5 << 20
NBYTES = 2 * PART + 777


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with running_proxy(s3_server.port) as proxy:
        yield proxy


@pytest.fixture
def prefix() -> str:
    return f"run-{secrets.token_hex(4)}"


@pytest.fixture
def storage(request: pytest.FixtureRequest, s3_server: S3Server, proxy: FaultProxy, prefix: str) -> ObjectStorage:
    options = s3_server.options(port=proxy.port)
    # Short for tests that wait for the limit; long for all others, so that they do not reach it on a busy machine.
    stalls = "stall" in request.node.name
    options["client_options"] |= {"timeout": timedelta(seconds=2 if stalls else 20)}
    retries: Any = {
        "max_retries": 1 if stalls else 2,
        "backoff": {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20), "base": 2},
        "retry_timeout": timedelta(seconds=60),
    }
    return ObjectStorage(S3Store(BUCKET, **options, retry_config=retries), prefix)


class Attempt:
    """A save of one large and one small file, whose parts tell when they die."""

    def __init__(self, storage: ObjectStorage) -> None:
        self.storage = storage
        self.data = some_bytes(NBYTES)
        self.alive: list[weakref.ref[Any]] = []

    async def parts(self) -> AsyncIterator[memoryview]:
        for start in range(0, NBYTES, PART):
            part = np.array(self.data[start : start + PART])
            self.alive.append(weakref.ref(part))
            view = memoryview(part)
            del part
            yield view
            del view

    async def run(self) -> None:
        pending = await self.storage.open("a")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(pending.write("data", NBYTES, self.parts()))
                group.create_task(write(pending, "small", self.data[:1000]))
            await pending.commit(self.data[:100])
        except* OSError as errors:
            raise errors.exceptions[0] from None
        finally:
            await pending.abort()

    async def memory_is_back(self) -> None:
        """Wait until nothing refers to what the store was given. The test's timeout is the limit."""
        gc.collect()
        while any(reference() is not None for reference in self.alive):
            # The store may hold a buffer for some milliseconds after it has been cancelled.
            await asyncio.sleep(0.005)
            gc.collect()


def what_is_left(server: S3Server, prefix: str) -> list[str]:
    store = S3Store(BUCKET, **server.options())
    return [meta["path"] for meta in obstore.list(store, prefix).collect()]


def begun_again(proxy: FaultProxy, kind: Kind, request: str) -> int:
    """Return how many uploads stay open: where the answer to a beginning is lost, only the server knows its name."""
    if (kind, request) != ("lost", BEGIN):
        return 0
    begun = sum(Fault("lost", BEGIN).strikes(line) for line in proxy.lines)
    return begun - sum(Fault("lost", COMPLETE).strikes(line) for line in proxy.lines)


async def test_a_save_without_faults_makes_all_these_requests(
    storage: ObjectStorage, s3_server: S3Server, proxy: FaultProxy, prefix: str
) -> None:
    attempt = Attempt(storage)
    await attempt.run()
    assert await content(storage, "a") == (bytes(attempt.data[:100]), bytes(attempt.data))
    for request in (BEGIN, SEND, COMPLETE, SMALL, MANIFEST, POINTER):
        fault = Fault("status", request)
        assert any(fault.strikes(line) for line in proxy.lines), f"no request is {request}: {proxy.lines}"


@pytest.mark.parametrize(
    ("kind", "number", "request_"),
    [
        ("status", 500, BEGIN),
        ("status", 503, SEND),
        ("status", 500, COMPLETE),
        ("status", 503, SMALL),
        ("status", 500, MANIFEST),
        ("status", 503, POINTER),
        ("status", 409, POINTER),
        ("status", 412, POINTER),
        ("cut", 1 << 20, SEND),
        ("cut", 10, SMALL),
        ("stall", 1 << 20, SEND),
        ("lost", 0, BEGIN),
        ("lost", 0, SEND),
        ("lost", 0, POINTER),
    ],
)
async def test_what_passes_is_retried(
    storage: ObjectStorage,
    s3_server: S3Server,
    proxy: FaultProxy,
    prefix: str,
    kind: Kind,
    number: int,
    request_: str,
) -> None:
    fault = Fault(kind, request_, 1, number)
    proxy.faults.append(fault)
    attempt = Attempt(storage)
    await attempt.run()
    assert fault.struck == 1
    assert await content(storage, "a") == (bytes(attempt.data[:100]), bytes(attempt.data))
    assert len(what_is_left(s3_server, prefix)) == 5
    assert len(open_uploads(s3_server, prefix)) == begun_again(proxy, kind, request_)
    await attempt.memory_is_back()


@pytest.mark.parametrize(
    ("kind", "number", "request_"),
    [
        ("status", 500, BEGIN),
        ("status", 503, SEND),
        ("status", 403, SEND),
        ("status", 500, COMPLETE),
        ("status", 500, SMALL),
        ("status", 503, MANIFEST),
        ("status", 500, POINTER),
        ("cut", 1 << 20, SEND),
        ("cut", 10, POINTER),
        ("stall", 1 << 20, SEND),
        ("lost", 0, BEGIN),
    ],
)
async def test_what_stays_is_an_error(
    storage: ObjectStorage,
    s3_server: S3Server,
    proxy: FaultProxy,
    prefix: str,
    kind: Kind,
    number: int,
    request_: str,
) -> None:
    proxy.faults.append(Fault(kind, request_, number=number))
    attempt = Attempt(storage)
    with pytest.raises(StorageError, match=rf"^s3://{BUCKET}/{prefix}/a/"):
        await attempt.run()
    assert what_is_left(s3_server, prefix) == []
    assert len(open_uploads(s3_server, prefix)) == begun_again(proxy, kind, request_)
    await attempt.memory_is_back()


async def test_an_upload_that_cannot_be_aborted_is_a_warning(
    storage: ObjectStorage,
    s3_server: S3Server,
    proxy: FaultProxy,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is paid for until a rule of the bucket aborts it."""
    proxy.faults.append(Fault("status", ABORT, number=403))

    async def parts() -> AsyncIterator[memoryview]:
        yield some_bytes(PART)
        raise LookupError("of the caller")

    pending = await storage.open("a")
    with pytest.raises(LookupError, match="of the caller"):
        await pending.write("data", NBYTES, parts())
    await pending.abort()
    assert what_is_left(s3_server, prefix) == []
    assert len(open_uploads(s3_server, prefix)) == 1
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"could not abort the multipart upload of s3://{BUCKET}/{prefix}/a/data-")
    assert "AbortIncompleteMultipartUpload" in warning
    assert "Signature" not in warning


async def test_without_faults_no_upload_is_listed(
    storage: ObjectStorage, proxy: FaultProxy, s3_server: S3Server, prefix: str
) -> None:
    """A bucket need not allow it."""
    await Attempt(storage).run()
    await storage.clean_up()
    listed = Fault("status", OPEN)
    assert proxy.lines
    assert not any(listed.strikes(line) for line in proxy.lines)
    assert open_uploads(s3_server, prefix) == []


async def test_an_answer_to_the_commit_that_is_always_lost(
    storage: ObjectStorage, proxy: FaultProxy, prefix: str
) -> None:
    proxy.faults.append(Fault("lost", POINTER))
    attempt = Attempt(storage)
    await attempt.run()
    assert (await content(storage, "a"))[1] == bytes(attempt.data)
    with pytest.raises(CheckpointExistsError):
        await attempt.run()


async def test_out_of_reach_from_the_commit_on(
    storage: ObjectStorage, s3_server: S3Server, proxy: FaultProxy, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No one knows then whether the checkpoint is there, so nothing is removed."""
    pending = await storage.open("a")
    await write(pending, "data", some_bytes(1000))
    proxy.faults += [Fault("lost", POINTER), Fault("status", "^GET", number=503, spared=1)]
    with pytest.raises(StorageError):
        await pending.commit(some_bytes(1000)[:100])
    await pending.abort()
    assert "could not remove what is left" in caplog.text
    proxy.faults.clear()
    assert (await content(storage, "a"))[1] == bytes(some_bytes(1000))


@pytest.mark.parametrize("request_", [BEGIN, SEND, COMPLETE, SMALL, MANIFEST, POINTER])
async def test_cancelled_while_a_request_stalls(
    storage: ObjectStorage, s3_server: S3Server, proxy: FaultProxy, prefix: str, request_: str
) -> None:
    fault = Fault("stall", request_, 1)
    proxy.faults.append(fault)
    attempt = Attempt(storage)
    task = asyncio.ensure_future(attempt.run())
    while not fault.struck:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises((asyncio.CancelledError, CheckpointError)):
        await task
    assert open_uploads(s3_server, prefix) == []
    if what_is_left(s3_server, prefix):
        assert (await content(storage, "a"))[1] == bytes(attempt.data)
    await attempt.memory_is_back()


async def test_slow_is_no_error(storage: ObjectStorage, proxy: FaultProxy) -> None:
    proxy.faults.append(Fault("slow", SMALL, number=4000))
    attempt = Attempt(storage)
    await attempt.run()
    assert (await content(storage, "a"))[1] == bytes(attempt.data)


@pytest.mark.parametrize(("kind", "number"), [("cut", 0), ("lost", 0), ("status", 503)])
async def test_reading_with_faults_that_pass(
    storage: ObjectStorage, proxy: FaultProxy, kind: Kind, number: int
) -> None:
    data = some_bytes(NBYTES)
    await save(storage, "a", data)
    fault = Fault(kind, r"^GET .*/data$", 2, number)
    proxy.faults.append(fault)
    assert (await content(storage, "a"))[1] == bytes(data)
    assert fault.struck == 2 or kind == "cut"
    reader = await storage.read("a")
    proxy.faults[:] = [Fault(kind, r"^GET .*/data$", number=number)]
    if kind != "cut":
        with pytest.raises(StorageError, match="/data: "):
            await reader.read("data", 0, memoryview(bytearray(NBYTES)))
    proxy.faults.clear()
    await storage.delete("a")
    with pytest.raises(CheckpointNotFoundError):
        await reader.read("data", 0, memoryview(bytearray(NBYTES)))
