"""Multipart uploads that were begun and never ended: asking S3 which there are, and ending them.

obstore can do neither, and quotes the question mark in a path that it is to sign. But it signs ENDPOINT/PATH for any
endpoint, also for one that ends in a query. So a second store with such an endpoint signs these requests, with the
credentials of the first, wherever those come from. The path then is part of the last parameter's value; so that one is
of those that S3 promises to ignore, whose names begin with ``x-``.
"""

from __future__ import annotations

import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from http import HTTPStatus
from http.client import HTTPException
from typing import Any, Literal
from urllib.parse import quote, urlencode, urlsplit
from xml.etree import ElementTree

import anyio
import obstore
from obstore.store import S3Store

from aiostage._loop.workers import Workers
from aiostage.storage.bucket import Upload

__all__ = ["OpenUploads", "RefusedError"]

_PAGE = 200
"""Uploads in one answer, so that each is looked through in a fraction of a millisecond."""

_MAX_ANSWER_BYTES = 4 << 20

_NO_LIST = "unexpected response to ListMultipartUploads: not a list of open uploads."

_SIGNED_FOR = timedelta(minutes=5)

_TIMEOUT_SECONDS = 30.0
"""What obstore's stores allow a request by default."""

_REPLACED = frozenset(("endpoint", "aws_endpoint_url_s3", "endpoint_url_s3", "virtual_hosted_style_request"))
"""What says where a store is. The third is what obstore makes of the second, and does not take."""

_LATER = frozenset((HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS))


class RefusedError(Exception):
    """The store does not do what it was asked to, or not for these credentials; asking again is of no use."""


class _FailedError(OSError):
    """A request failed, and another one may not."""


class OpenUploads:
    """The uploads that are open in an S3 bucket.

    Requests go through the proxy of the store's options, or the environment's, trust the same certificates,
    and are retried as often as the store retries its own.

    Args:
        store: Whose bucket, credentials and configuration.
        prefix: Below which paths are; empty, or with a ``/`` at the end.
    """

    def __init__(self, store: S3Store, prefix: str) -> None:
        self._store = store
        above = f"{store.prefix.strip('/')}/" if store.prefix else ""
        self._steps = above.count("/") + 1
        self._prefix = above + prefix
        self._workers = Workers(1, "aiostage-uploads")
        self._opener: urllib.request.OpenerDirector | None = None

    async def list(self, prefix: str) -> AsyncIterator[Sequence[Upload]]:
        """Iterate over the uploads below a path.

        Raises:
            RefusedError: If the store has no such listing, or not for these credentials.
            OSError: If it cannot be reached.
        """
        marker: dict[str, str] = {}
        while True:
            # In plain XML: not every server that says it has encoded the keys, when asked to, has done so.
            query = {"uploads": "", "max-uploads": str(_PAGE), "prefix": self._prefix + prefix}
            answer = await self._answer("GET", "", query | marker)
            uploads, following = await self._workers.run(partial(_parse, answer, self._prefix))
            yield uploads
            if not following:
                return
            if following == marker:
                raise RefusedError(_NO_LIST)
            marker = following

    async def abort(self, upload: Upload) -> None:
        """End an upload. One that is over is no error.

        Raises:
            RefusedError: If the store does not do that, or not for these credentials.
            OSError: If it cannot be reached.
        """
        await self._answer("DELETE", self._prefix + upload.path, {"uploadId": upload.id})

    async def _answer(self, method: Literal["GET", "DELETE"], key: str, query: Mapping[str, str]) -> bytes:
        """Return what the store answers, trying again as its own policy says."""
        policy: Mapping[str, Any] = self._store.retry_config or {}
        backoff = policy.get("backoff", {})
        pause = backoff.get("init_backoff", timedelta(milliseconds=100)).total_seconds()
        most = backoff.get("max_backoff", timedelta(seconds=15)).total_seconds()
        deadline = time.monotonic() + policy.get("retry_timeout", timedelta(minutes=3)).total_seconds()
        retries = policy.get("max_retries", 10)
        while True:
            url = await self._signed(method, key, query)
            try:
                return await self._workers.run(partial(self._send, method, url))
            except _FailedError:
                if retries <= 0 or time.monotonic() + pause > deadline:
                    raise
            await anyio.sleep(pause)
            retries -= 1
            pause = min(most, pause * backoff.get("base", 2))

    async def _signed(self, method: Literal["GET", "DELETE"], key: str, query: Mapping[str, str]) -> str:
        """Return the URL of a request, good for some minutes."""
        skipped = self._store.config.get("skip_signature") or os.environ.get("AWS_SKIP_SIGNATURE", "")
        if str(skipped).lower() in ("1", "true", "on", "yes", "y"):
            raise RefusedError("it is used without credentials.")
        plain = (await obstore.sign_async(self._store, "GET", "-", _SIGNED_FOR)).partition("?")[0]
        # The store's prefix and the path that was signed.
        bucket = plain.rsplit("/", self._steps)[0]
        endpoint = f"{bucket}/{quote(key)}" if key else bucket
        asked = urlencode(query, quote_via=quote, safe="")
        signer = await self._workers.run(partial(_signer, self._store, f"{endpoint}?{asked}&x-aiostage="))
        signed = await obstore.sign_async(signer, method, "-", _SIGNED_FOR)
        wanted, got = urlsplit(f"{endpoint}?{asked}"), urlsplit(signed)
        if (wanted.netloc, wanted.path.rstrip("/")) != (got.netloc, got.path.rstrip("/")) or not got.query.startswith(
            wanted.query
        ):
            raise RefusedError("this version of obstore signs no queries.")
        return signed

    def _send(self, method: str, url: str) -> bytes:
        """Send a request. Blocks."""
        if self._opener is None:
            self._opener = _opener(self._store.client_options or {})
        try:
            with self._opener.open(urllib.request.Request(url, method=method), timeout=_TIMEOUT_SECONDS) as answer:
                body: bytes = answer.read(_MAX_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == HTTPStatus.NOT_FOUND and method == "DELETE":
                    return b""
                reason = _reason(error)
            if error.code in _LATER or (error.code >= 500 and error.code != HTTPStatus.NOT_IMPLEMENTED):
                raise _FailedError(reason) from None
            raise RefusedError(reason) from None
        except (OSError, HTTPException) as error:
            # Not what urllib says, which has the URL and with it the signature in it.
            raise _FailedError(f"{getattr(error, 'reason', error)}.") from None
        if len(body) > _MAX_ANSWER_BYTES:
            raise RefusedError(_NO_LIST)
        return body


def _signer(store: S3Store, endpoint: str) -> S3Store:
    """Return a store that is another one but for its endpoint. Takes some milliseconds."""
    config: Any = {key: value for key, value in store.config.items() if key not in _REPLACED}
    # The service's own endpoint goes before the general one, also if the environment has either.
    config |= {"aws_endpoint_url_s3": endpoint, "virtual_hosted_style_request": True}
    return S3Store(
        config=config,
        client_options=store.client_options,
        retry_config=store.retry_config,
        credential_provider=store.credential_provider,
    )


def _opener(options: Mapping[str, Any]) -> urllib.request.OpenerDirector:
    """Return what sends requests as a store with such options does. Blocks: it reads certificates."""
    context = ssl.create_default_context()
    if str(options.get("allow_invalid_certificates", "")).lower() == "true":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    root = options.get("root_certificate")
    if root is not None:
        context.load_verify_locations(cadata=root if isinstance(root, str) else bytes(root).decode())
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    proxy = options.get("proxy_url")
    if proxy is not None:
        handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
    return urllib.request.build_opener(*handlers)


def _parse(answer: bytes, prefix: str) -> tuple[Sequence[Upload], dict[str, str]]:
    """Return the uploads of a listing, and where the next one begins; nowhere if there is none."""
    try:
        root = ElementTree.fromstring(answer)
        if root.tag.rpartition("}")[2] != "ListMultipartUploadsResult":
            raise ValueError(root.tag)
        uploads = [
            Upload(
                element.findtext("{*}Key", "").removeprefix(prefix),
                element.findtext("{*}UploadId", ""),
                datetime.fromisoformat(element.findtext("{*}Initiated", "")).astimezone(UTC),
            )
            for element in root.iterfind("{*}Upload")
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise RefusedError(_NO_LIST) from error
    if root.findtext("{*}IsTruncated") != "true":
        return uploads, {}
    following = {
        "key-marker": root.findtext("{*}NextKeyMarker", ""),
        "upload-id-marker": root.findtext("{*}NextUploadIdMarker", ""),
    }
    return uploads, following


def _reason(error: urllib.error.HTTPError) -> str:
    """Return why a store has refused, in its own words where it has any."""
    try:
        root = ElementTree.fromstring(error.read(_MAX_ANSWER_BYTES))
        said = [text for name in ("Code", "Message") if (text := root.findtext(f"{{*}}{name}"))]
    except (ElementTree.ParseError, OSError, HTTPException):
        said = []
    return ": ".join([str(error.code), *(said or [error.reason])]).rstrip(".") + "."
