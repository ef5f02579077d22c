"""The proxy of the tests closes what it accepted, however late."""

from __future__ import annotations

import gc
import socket

import pytest

from .proxy import running_proxy


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_connection_that_comes_as_it_stops(number: int) -> None:
    """Nothing is left to the collector, whose warnings would fail the test."""
    for _ in range(20):
        with running_proxy(1) as proxy:
            clients = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(number)]
        for client in clients:
            client.close()
    gc.collect()
