"""An S3 server that takes everything and keeps nothing, so that clients are measured and not a server.

    python benchmarks/null_sink.py

It prints its port and serves until its standard input ends. It knows as much of S3's language as uploads need.
"""

from __future__ import annotations

import re
import socket
import sys
import threading

_BUFFER_BYTES = 1 << 20
_HEAD_END = b"\r\n\r\n"
_UPLOAD = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
_COMPLETE = b"<CompleteMultipartUploadResult><ETag>1</ETag></CompleteMultipartUploadResult>"
_LIST = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"


def serve(connection: socket.socket) -> None:
    """Answer the requests of one connection."""
    buffer = bytearray(_BUFFER_BYTES)
    view = memoryview(buffer)
    received = b""
    with connection:
        while True:
            while _HEAD_END not in received:
                count = connection.recv_into(buffer)
                if not count:
                    return
                received += view[:count]
            head, _, rest = received.partition(_HEAD_END)
            found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            left = int(found[1]) if found else 0
            received = rest[left:]
            left -= min(left, len(rest))
            while left:
                count = connection.recv_into(view[: min(left, _BUFFER_BYTES)])
                if not count:
                    return
                left -= count
            connection.sendall(answer(head))


def answer(head: bytes) -> bytes:
    method, target, _ = head.split(b" ", 2)
    status, body = b"200 OK", b""
    if method == b"POST":
        body = _UPLOAD if target.endswith((b"?uploads", b"?uploads=")) else _COMPLETE
    elif method == b"GET" and b"list-type=" in target:
        body = _LIST
    elif method == b"GET":
        status = b"404 Not Found"
    return b"".join(
        (
            b"HTTP/1.1 " + status + b'\r\nETag: "1"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n',
            b"Content-Length: %d\r\n\r\n" % len(body),
            body,
        )
    )


def accept(listening: socket.socket) -> None:
    while True:
        connection, _ = listening.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    threading.Thread(target=accept, args=(listening,), daemon=True).start()
    print(listening.getsockname()[1], flush=True)
    sys.stdin.read()
