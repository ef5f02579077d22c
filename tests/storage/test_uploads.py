"""Multipart uploads that nobody completes are ended, on a real server, and none that somebody is at work on."""

from __future__ import annotations

import asyncio
import secrets
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import obstore
import pytest
from obstore.store import AzureStore, GCSStore, S3Store

from aiostage.storage import clean_up as sweeping
from aiostage.storage import uploads as module
from aiostage.storage.bucket import Upload
from aiostage.storage.objects import ObjectStorage
from aiostage.storage.uploads import OpenUploads, RefusedError
from aiostage.testing import at_every_await
from tests.servers.s3 import open_uploads
from tests.servers.weed import BUCKET, S3Server
from tests.storage.buckets import content, save, some_bytes, write

pytestmark = pytest.mark.asyncio

PART = 5 << 20
LEASE = 3600.0


@pytest.fixture
def store(s3_server: S3Server) -> S3Store:
    return S3Store(BUCKET, prefix=f"run {secrets.token_hex(4)}", **s3_server.options())


async def begin(store: S3Store, path: str) -> None:
    """Leave an upload open."""
    writer = obstore.open_writer_async(store, path, buffer_size=PART)
    await writer.write(bytes(PART + 1))
    waiting = OpenUploads(store, "")
    while path not in [upload.path async for batch in waiting.list("") for upload in batch]:
        await asyncio.sleep(0.005)


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let a sweep believe that it takes place later than it does."""
    now = sweeping._now

    async def then(bucket: Any) -> datetime:
        return await now(bucket) + timedelta(seconds=seconds)

    monkeypatch.setattr(sweeping, "_now", then)


def left(server: S3Server, store: S3Store) -> list[str]:
    return open_uploads(server, store.prefix or "")


async def test_uploads_are_listed_and_ended(
    s3_server: S3Server, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["b/+ä&=?%41.bin", "b/a", "b/c/d"]
    for name in [*names, "other"]:
        await begin(store, name)
    uploads = OpenUploads(store, "b/")
    for size, sizes in ((200, [3]), (2, [2, 1])):
        monkeypatch.setattr(module, "_PAGE", size)
        batches = [batch async for batch in uploads.list("")]
        assert [len(batch) for batch in batches] == sizes
        found = [upload for batch in batches for upload in batch]
        assert sorted(f"b/{upload.path}" for upload in found) == names
    for upload in found:
        await uploads.abort(upload)
    assert left(s3_server, store) == [f"{store.prefix}/other"]
    await uploads.abort(found[0])


async def test_a_sweep_leaves_the_uploads_of_the_living(
    s3_server: S3Server, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it would not wait as long for a sign of life itself."""
    data = some_bytes(2 * PART + 3)
    half, go_on = asyncio.Event(), asyncio.Event()

    async def parts() -> Any:
        yield data[:PART]
        half.set()
        await go_on.wait()
        for start in (PART, 2 * PART):
            yield data[start : start + PART]

    pending = await ObjectStorage(store, lease_seconds=LEASE).open("a")
    writing = asyncio.ensure_future(pending.write("data", data.nbytes, parts()))
    await half.wait()
    while not left(s3_server, store):
        await asyncio.sleep(0.005)
    later(monkeypatch, LEASE - 60)
    await ObjectStorage(store, lease_seconds=1).clean_up()
    assert len(left(s3_server, store)) == 1
    go_on.set()
    await writing
    await pending.commit(data[:100])
    assert await content(ObjectStorage(store), "a") == (bytes(data[:100]), bytes(data))
    assert left(s3_server, store) == []


@pytest.mark.parametrize("folder", ["empty", "leased"])
async def test_a_sweep_ends_the_uploads_of_the_dead(
    s3_server: S3Server, store: S3Store, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """Of a folder that was removed meanwhile, an upload may be all that is left."""
    storage = ObjectStorage(store, lease_seconds=LEASE)
    if folder == "leased":
        pending = await storage.open("a")
        begun = f"a/data-{await pending.token()}/data"
    else:
        begun = "a/data-0123456789abcdef/data"
    await begin(store, begun)
    foreign = ["a/data", "data-0123456789abcdef/data", "a/data-0123456789abcdef/more/data"]
    for path in foreign:
        await begin(store, path)
    later(monkeypatch, LEASE - 60)
    await storage.clean_up()
    assert len(left(s3_server, store)) == 4
    later(monkeypatch, 70)
    await storage.clean_up()
    assert sorted(left(s3_server, store)) == sorted(f"{store.prefix}/{path}" for path in foreign)
    assert [meta["path"] for meta in obstore.list(store).collect()] == []


async def test_a_sweep_ends_the_uploads_to_what_is_committed(s3_server: S3Server, store: S3Store) -> None:
    """Whoever has committed needs no more of them, however young they are."""
    storage = ObjectStorage(store, lease_seconds=LEASE)
    data = some_bytes(1000)
    await save(storage, "a", data)
    (lease,) = [meta["path"] for meta in obstore.list(store).collect() if meta["path"].endswith("/lease.json")]
    await begin(store, lease.replace("lease.json", "data"))
    await storage.clean_up()
    assert left(s3_server, store) == []
    assert await content(storage, "a") == (bytes(data[:100]), bytes(data))


async def test_a_draft_ends_what_others_have_begun_in_its_name(s3_server: S3Server, store: S3Store) -> None:
    storage = ObjectStorage(store)
    for commits in (True, False):
        pending = await storage.open("a", overwrite=True)
        begun = f"a/data-{await pending.token()}/theirs"
        await write(pending, "data", some_bytes(1000))
        await begin(store, begun)
        if commits:
            await pending.commit(some_bytes(100))
        else:
            await pending.abort()
        assert left(s3_server, store) == []
    assert (await content(storage, "a"))[0] == bytes(some_bytes(100))


@pytest.mark.slow
async def test_a_sweep_cancelled_at_every_await(
    s3_server: S3Server, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = ObjectStorage(store, lease_seconds=LEASE)
    data = some_bytes(1000)
    await save(storage, "a", data)
    later(monkeypatch, LEASE + 60)
    await begin(store, "b/data-0123456789abcdef/data")
    async for _ in at_every_await(storage.clean_up):
        if not left(s3_server, store):
            await begin(store, "b/data-0123456789abcdef/data")
    assert left(s3_server, store) == []
    assert await content(storage, "a") == (bytes(data[:100]), bytes(data))


# What is signed, and with what


async def signed(store: S3Store) -> tuple[str, dict[str, list[str]]]:
    """Return where a request goes, and its query."""
    url = urlsplit(await OpenUploads(store, "p/")._signed("DELETE", "p/k ey", {"uploadId": "a/b+c"}))
    return f"{url.scheme}://{url.netloc}{url.path}", parse_qs(url.query)


@pytest.mark.parametrize(
    ("options", "bucket"),
    [
        ({"region": "eu-west-1"}, "https://s3.eu-west-1.amazonaws.com/b"),
        ({"region": "eu-west-1", "virtual_hosted_style_request": True}, "https://b.s3.eu-west-1.amazonaws.com"),
        ({"endpoint": "https://minio:9000/"}, "https://minio:9000/b"),
        ({"endpoint": "https://minio/b", "virtual_hosted_style_request": True}, "https://minio/b"),
        ({"aws_endpoint_url_s3": "https://minio", "endpoint": "https://other"}, "https://minio/b"),
        ({"prefix": "x y/z"}, "https://s3.us-east-1.amazonaws.com/b"),
    ],
)
@pytest.mark.parametrize("environment", [{}, {"AWS_ENDPOINT_URL": "https://a", "AWS_ENDPOINT_URL_S3": "https://c"}])
async def test_requests_go_where_the_store_is(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], bucket: str, environment: dict[str, str]
) -> None:
    store = S3Store("b", access_key_id="key", secret_access_key="secret", **options)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    where, query = await signed(store)
    assert where == f"{bucket}/p/k%20ey" if "prefix" not in options else f"{bucket}/x%20y/z/p/k%20ey"
    assert query["uploadId"] == ["a/b+c"]
    assert query["X-Amz-Credential"][0].startswith("key/")
    assert query["X-Amz-SignedHeaders"] == ["host"]


async def test_credentials_may_come_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    async def provide() -> Any:
        return {"access_key_id": "role", "secret_access_key": "s", "token": "for now", "expires_at": None}

    _, query = await signed(S3Store("b", credential_provider=provide))
    assert query["X-Amz-Credential"][0].startswith("role/")
    assert query["X-Amz-Security-Token"] == ["for now"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    _, query = await signed(S3Store("b"))
    assert query["X-Amz-Credential"][0].startswith("environment/")


@pytest.mark.parametrize("environment", [False, True])
async def test_without_credentials_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, environment: bool) -> None:
    if environment:
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    store = S3Store("b") if environment else S3Store("b", skip_signature=True)
    with pytest.raises(RefusedError, match="without credentials"):
        await signed(store)


async def test_stores_that_cannot_be_asked_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    name = secrets.token_hex(4)
    for _ in range(2):
        google = ObjectStorage(GCSStore(name, skip_signature=True))
        assert [batch async for batch in google._bucket.uploads("")] == []
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"open multipart uploads of gs://{name} cannot be listed and ended: ")
    caplog.clear()
    azure = ObjectStorage(AzureStore(name, account_name="a", skip_signature=True))
    assert [batch async for batch in azure._bucket.uploads("")] == []
    assert not caplog.records


# What a store may answer


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"<ListBucketResult/>",
        b"<ListMultipartUploadsResult><Upload><Key>a</Key></Upload></ListMultipartUploadsResult>",
    ],
)
async def test_answers_that_are_no_list(answer: bytes) -> None:
    with pytest.raises(RefusedError, match="unexpected response to ListMultipartUploads: not a list of open uploads"):
        module._parse(answer, "")


async def test_a_list_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (
        b"<ListMultipartUploadsResult><IsTruncated>true</IsTruncated><NextKeyMarker>a</NextKeyMarker>"
        b"<Upload><Key>p/a%20</Key><UploadId>1</UploadId><Initiated>2026-01-01T00:00:00.000Z</Initiated></Upload>"
        b"</ListMultipartUploadsResult>"
    )
    uploads, following = module._parse(page, "p/")
    assert uploads == [Upload("a%20", "1", datetime.fromisoformat("2026-01-01T00:00:00+00:00"))]
    assert following == {"key-marker": "a", "upload-id-marker": ""}
    store = OpenUploads(S3Store("b", access_key_id="k", secret_access_key="s"), "")
    monkeypatch.setattr(store, "_send", lambda method, url: page)
    with pytest.raises(RefusedError, match="unexpected response to ListMultipartUploads: not a list of open uploads"):
        assert [batch async for batch in store.list("")]
