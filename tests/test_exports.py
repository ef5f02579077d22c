"""What ``import aiostage`` gives, and what it does not do."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import typing

import pytest

import aiostage
from aiostage import errors
from tests.patience import seconds
from tests.warm import PYTHON

CONTRACT = {
    "AsyncStager",
    "Backend",
    "CheckpointInfo",
    "CheckpointStager",
    "Checkpointer",
    "SaveHandle",
    "Snapshot",
    "StagedLeaf",
    "StagerStatistics",
    "StagingOptions",
    "SupportsQuery",
    "adapt",
    "load",
    "save",
    "wait_event",
    *errors.__all__,
}


def test_the_contract_and_nothing_else() -> None:
    assert set(aiostage.__all__) == CONTRACT
    assert list(aiostage.__all__) == sorted(aiostage.__all__)


@pytest.mark.parametrize("name", sorted(CONTRACT))
def test_every_name_is_documented(name: str) -> None:
    value = getattr(aiostage, name)
    assert inspect.getdoc(value)
    for attribute, member in vars(value).items() if inspect.isclass(value) else ():
        if not attribute.startswith("_") and inspect.isfunction(member):
            assert inspect.getdoc(member), f"{name}.{attribute}"


NAMES = ("abc", "blocking", "dcp", "errors", "leaf", "observe", "options", "storage", "testing", "weights")
MODULES = ["aiostage", *(f"aiostage.{name}" for name in NAMES)]


@pytest.mark.parametrize("name", MODULES)
def test_annotations_can_be_looked_up(name: str) -> None:
    """As frameworks do that validate or inject arguments, and as Python 3.14 does on demand."""
    module = importlib.import_module(name)
    for public in module.__all__:
        value = getattr(module, public)
        for member in (value, *(vars(value).values() if inspect.isclass(value) else ())):
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(function) or inspect.isclass(function):
                typing.get_type_hints(function)


def test_importing_touches_no_device_and_nothing_optional_until_it_is_asked_for() -> None:
    program = (
        "import sys, aiostage, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "optional = {'uvloop', 'obstore', 'trio', 'safetensors', 'torch.distributed.checkpoint'}\n"
        "optional |= {'opentelemetry', 'tqdm.auto'}\n"
        "assert not optional & set(sys.modules), optional & set(sys.modules)\n"
        "assert 'aiostage.dcp' not in sys.modules and 'aiostage.blocking' not in sys.modules\n"
        "assert {'dcp', 'blocking', 'storage', 'save'} <= set(dir(aiostage))\n"
        "assert aiostage.dcp.save and aiostage.blocking.save and aiostage.storage and aiostage.testing\n"
        "assert not hasattr(aiostage, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=seconds(60))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_importing_and_staging_on_the_cpu_load_no_driver() -> None:
    # A build for CUDA may find its driver's library; a process that has started it cannot use it in its forks.
    program = (
        "import asyncio, aiostage, torch\n"
        "stager = aiostage.AsyncStager()\n"
        "async def main():\n"
        "    async with stager: await stager.stage({'a': torch.ones(3)})\n"
        "asyncio.run(main())\n"
        "assert 'libcuda.so' not in open('/proc/self/maps').read()\n"
        "assert not torch.cuda._is_in_bad_fork() and not torch.cuda.is_initialized()\n"
    )
    subprocess.run([*PYTHON, "-c", program], check=True, timeout=seconds(60))
