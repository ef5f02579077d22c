"""Errors of a first use of object stores are clear and say what to do."""

from __future__ import annotations

import pickle
import re
import secrets
from typing import Any

import pytest
from obstore.exceptions import GenericError

from aiostage import StorageError
from aiostage.storage.objects import ObjectStorage, translate, worded
from tests.servers.proxy import Fault, running_proxy
from tests.servers.weed import BUCKET, S3Server

pytestmark = pytest.mark.asyncio

ONCE: dict[str, Any] = {"retry_config": {"max_retries": 0}}
KEYS = {"access_key_id": "k", "secret_access_key": "s"}
HTTP = {"client_options": {"allow_http": True}}


async def error_text(url: str, **options: Any) -> str:
    """Return what is said when a checkpoint cannot be written."""
    with pytest.raises(StorageError) as caught:
        await ObjectStorage.from_url(url, **ONCE, **options).open("a")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        ("s3://b/runs", {"metadata_endpoint": "http://127.0.0.1:1"}, r"Connection refused\. No credentials.*~/\.aws"),
        (
            "s3://b/runs",
            KEYS | {"endpoint": "http://127.0.0.1:1"},
            r"builder error\. Use https://, or .*AWS_ALLOW_HTTP",
        ),
        (
            "s3://b/runs",
            KEYS | HTTP | {"endpoint": "http://127.0.0.1:1"},
            "error sending request: Connection refused.$",
        ),
        ("s3://b/runs", KEYS | HTTP | {"endpoint": "http://no.invalid:1"}, "error sending request: failed to lookup"),
    ],
)
async def test_before_a_store_is_reached(
    monkeypatch: pytest.MonkeyPatch, url: str, options: dict[str, Any], expected: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    said = await error_text(url, **options)
    assert said.startswith("s3://b/runs/a/checkpoint.json: ")
    assert re.search(expected, said), said
    assert "Debug source" not in said


async def test_a_request_that_takes_too_long(s3_server: S3Server) -> None:
    with running_proxy(s3_server.port) as proxy:
        proxy.faults.append(Fault("stall", "^GET"))
        options = s3_server.options(port=proxy.port)
        options["client_options"]["timeout"] = "200ms"
        said = await error_text(f"s3://{BUCKET}/runs", **options)
    assert said.endswith('allow more: client_options={"timeout": "5 minutes"}.')


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_a_bucket_that_is_not_there(s3_server: S3Server, method: str) -> None:
    with running_proxy(s3_server.port) as proxy:
        proxy.faults.append(Fault("status", f"^{method}", number=404))
        said = await error_text(f"s3://{BUCKET}/{secrets.token_hex(4)}", **s3_server.options(port=proxy.port))
        assert said.endswith("NoSuchBucket: as told. Make the bucket, or check its name and the endpoint.")
        if method == "GET":
            storage = ObjectStorage.from_url(f"s3://{BUCKET}/runs", **ONCE, **s3_server.options(port=proxy.port))
            for call in (storage.read("a"), storage.list(), storage.clean_up()):
                with pytest.raises(StorageError, match="Make the bucket"):
                    await call


async def test_a_container_that_is_not_there(azure_options: dict[str, Any]) -> None:
    options = {name: value for name, value in azure_options.items() if name != "container_name"}
    assert "Make the bucket, or check its name and the endpoint." in await error_text("az://nobody/runs", **options)


async def test_an_answer_of_a_server_is_reported_without_its_markup(s3_server: S3Server) -> None:
    said = await error_text(f"s3://{BUCKET}/runs", **(s3_server.options() | {"secret_access_key": "?"}))
    assert re.search(
        r"403 Forbidden: SignatureDoesNotMatch: The request signature [^<>]*\. Check the credentials", said
    )


@pytest.mark.parametrize("path", ["/metadata/identity/oauth2/token", "/computeMetadata/v1/instance"])
async def test_machines_without_a_role(path: str) -> None:
    error = translate(GenericError(f"Error performing GET http://169.254.169.254{path} in 1ms"), "gs://b/a")
    assert str(error).startswith("gs://b/a: Error performing GET ")
    assert str(error).endswith("No credentials were found, neither in the environment nor a role of this machine.")


async def test_what_is_not_of_the_store_passes() -> None:
    for error in (KeyError("a"), FileNotFoundError("a"), StorageError("a", path="b"), NotImplementedError()):
        assert translate(error, "somewhere") is error
    assert worded(ValueError("this is  wrong.")) == "this is wrong."
