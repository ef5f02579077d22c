"""The policy for every test: both asyncio loops, warnings are errors, nothing blocks the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

import hypothesis
import pytest
import uvloop
from blockbuster import blockbuster_ctx

hypothesis.settings.register_profile(
    "aiostage",
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("aiostage")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every asyncio test on the stock loop and on uvloop."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
def anyio_backend() -> str:
    """Run tests marked for anyio on trio; asyncio has pytest-asyncio."""
    return "trio"


@pytest.fixture(autouse=True)
def _nothing_blocks() -> Iterator[None]:
    """Fail a test whose coroutine calls something of aiostage that blocks the event loop."""
    with blockbuster_ctx("aiostage"):
        yield
