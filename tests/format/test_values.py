from __future__ import annotations

import base64

import pytest

from aiostage.format.values import read_bytes


@pytest.mark.parametrize(("name", "kind"), [("bytes", bytes), ("bytearray", bytearray)])
@pytest.mark.parametrize("count", [0, 1, 3, (48 << 10) - 1, 48 << 10, (48 << 10) + 1, 1 << 20])
def test_bytes_are_decoded_in_pieces(name: str, kind: type, count: int) -> None:
    value = bytes(range(256)) * (count // 256) + bytes(count % 256)
    form = base64.b64encode(value).decode()
    found = read_bytes(name, form)
    assert type(found) is kind
    assert found == value


def test_bytes_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"base64|padding"):
        read_bytes("bytes", "abc?")
    with pytest.raises(ValueError, match="padding"):
        read_bytes("bytes", "abc")
