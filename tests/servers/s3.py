"""Just enough of S3's language to ask a server what its clients cannot: which uploads are open."""

from __future__ import annotations

import hashlib
import hmac
import urllib.request
from datetime import UTC, datetime
from xml.etree import ElementTree

from tests.servers.weed import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server

_EMPTY = hashlib.sha256(b"").hexdigest()


def _mac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")


def _get(server: S3Server, query: str) -> bytes:
    """Send a signed request about the bucket."""
    now = datetime.now(UTC)
    time, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    host = f"127.0.0.1:{server.port}"
    headers = {"host": host, "x-amz-content-sha256": _EMPTY, "x-amz-date": time}
    signed = ";".join(headers)
    request = "\n".join(
        ["GET", f"/{BUCKET}", query, *(f"{name}:{value}" for name, value in headers.items()), "", signed, _EMPTY]
    )
    scope = f"{day}/us-east-1/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", time, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{SECRET_KEY}".encode()
    for step in scope.split("/"):
        key = _mac(key, step)
    signature = _mac(key, text).hex()
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/{scope}, SignedHeaders={signed}, Signature={signature}"
    )
    url = f"http://{host}/{BUCKET}?{query}"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        body: bytes = answer.read()
    return body


def open_uploads(server: S3Server, prefix: str) -> list[str]:
    """Return the keys of the multipart uploads that are open below a prefix."""
    root = ElementTree.fromstring(_get(server, "uploads="))
    keys = [key.text or "" for key in root.iterfind(".//{*}Upload/{*}Key")]
    return [key for key in keys if key.startswith(prefix)]
