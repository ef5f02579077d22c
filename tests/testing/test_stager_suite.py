"""Our own stagers and PyTorch's, and the example of a stager of one's own, run through the suite for users' stagers."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.staging import StagingOptions as TorchStagingOptions

from aiostage import AsyncStager, CheckpointStager, StagerClosedError, StagingOptions, adapt
from aiostage.testing import SimulatedAccelerator, StagerSuite

PLAIN = {"use_pinned_memory": False, "use_shared_memory": False, "use_non_blocking_copy": False}


@pytest.mark.asyncio
class TestAsyncStager(StagerSuite):
    def make_stager(self) -> CheckpointStager:
        return AsyncStager()


@pytest.mark.anyio
class TestAsyncStagerOnTrio(StagerSuite):
    def make_stager(self) -> CheckpointStager:
        return AsyncStager()


@pytest.mark.asyncio
class TestSharedMemory(StagerSuite):
    def make_stager(self) -> CheckpointStager:
        return AsyncStager(StagingOptions(use_shared_memory=True))


@pytest.mark.asyncio
class TestCopiesOnTheLoop(StagerSuite):
    def make_stager(self) -> CheckpointStager:
        return AsyncStager(StagingOptions(use_async_staging=False))


@pytest.mark.asyncio
class TestWithAnAccelerator(StagerSuite):
    def make_stager(self) -> CheckpointStager:
        return AsyncStager(backend=SimulatedAccelerator(seed=3, spontaneous=True))


@pytest.mark.asyncio
class TestDefaultStager(StagerSuite):
    keeps_results = False
    keeps_parameters = False

    def make_stager(self) -> CheckpointStager:
        return adapt(DefaultStager(TorchStagingOptions(use_async_staging=True, **PLAIN)))


class DeepCopyStager(CheckpointStager):
    """What most people would write first."""

    def __init__(self) -> None:
        self.closed = False

    async def stage(self, state_dict: Any) -> Any:
        if self.closed:
            raise StagerClosedError
        return await asyncio.to_thread(copy.deepcopy, state_dict)

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.asyncio
class TestDeepCopyStager(StagerSuite):
    def make_stager(self) -> CheckpointStager:
        return DeepCopyStager()


class Shallow(DeepCopyStager):
    async def stage(self, state_dict: Any) -> Any:
        await super().stage(state_dict)
        return copy.copy(state_dict)


class Blocking(DeepCopyStager):
    async def stage(self, state_dict: Any) -> Any:
        if self.closed:
            raise StagerClosedError
        return copy.deepcopy(state_dict)


class Overwriting(DeepCopyStager):
    last: Any = None

    async def stage(self, state_dict: Any) -> Any:
        staged = await super().stage(state_dict)
        if self.last is not None and "weights" in staged:
            for name, tensor in staged["weights"].items():
                self.last["weights"][name].copy_(tensor)
        else:
            self.last = staged
        return self.last


class Swallowing(DeepCopyStager):
    async def stage(self, state_dict: Any) -> Any:
        try:
            return await super().stage(state_dict)
        except asyncio.CancelledError:
            return copy.deepcopy(state_dict)


class NeverClosed(DeepCopyStager):
    async def aclose(self) -> None:
        return


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("stager", "test"),
    [
        (Shallow, "test_no_change_to_the_source_shows"),
        (Shallow, "test_no_change_to_the_copy_shows"),
        (Blocking, "test_the_event_loop_gets_its_turn"),
        (Overwriting, "test_results_keep_their_values"),
        (Swallowing, "test_cancelled_at_every_await"),
        (NeverClosed, "test_closing"),
    ],
)
async def test_the_suite_finds_what_is_wrong(stager: type[CheckpointStager], test: str) -> None:
    class Suite(StagerSuite):
        def make_stager(self) -> CheckpointStager:
            return stager()

    with pytest.raises(AssertionError):
        await getattr(Suite(), test)()
