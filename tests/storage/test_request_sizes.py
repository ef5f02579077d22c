"""How large the requests are in which a file is sent to an object store."""

from __future__ import annotations

import pytest

from aiostage.storage.objects import _request_bytes
from tests.storage.buckets import PART


@pytest.mark.parametrize(
    ("nbytes", "part_bytes", "expected"),
    [
        (0, 0, 1),
        (100, 100, 101),
        (PART, PART, PART + 1),
        (PART + 1, PART, PART),
        (100 << 20, 4096, 5 << 20),
        (100 << 20, 3 << 20, 6 << 20),
        (10_000 * PART, PART, PART),
        (10_000 * PART + 1, PART, 2 * PART),
    ],
)
def test_requests_are_parts_where_the_store_allows(nbytes: int, part_bytes: int, expected: int) -> None:
    assert _request_bytes(nbytes, part_bytes) == expected
