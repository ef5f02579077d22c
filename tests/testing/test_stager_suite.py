"""Our own stagers and PyTorch's, and the example of a stager of one's own, run through the suite for users' stagers."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
import time
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.staging import StagingOptions as TorchStagingOptions

from aiostage import AsyncStager, CheckpointStager, StagerClosedError, StagingOptions, adapt
from aiostage.testing import SimulatedAccelerator, StagerSuite
from aiostage.testing.stager_suite import check_holds
from tests.device.accelerators import default_stager_stages_again
from tests.fuzz import naive

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


TWO_STAGINGS = {
    "test_many_tasks_at_once",
    "test_an_error_is_the_callers_and_changes_nothing",
    "test_cancelled_at_every_await",
}


@pytest.mark.asyncio
class TestDefaultStager(StagerSuite):
    keeps_results = False
    keeps_parameters = False
    one_moment = False
    # It works in a thread that keeps the GIL.
    longest_hold = 1.0

    def make_stager(self) -> CheckpointStager:
        return adapt(DefaultStager(TorchStagingOptions(use_async_staging=True, **PLAIN)))

    @pytest.fixture(autouse=True)
    def _a_second_staging(self, request: pytest.FixtureRequest) -> None:
        if request.node.originalname in TWO_STAGINGS and not default_stager_stages_again():
            pytest.skip("the stager of this PyTorch stages once")


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
    one_moment = False
    # It works in a thread that keeps the GIL, for long where that thread waits for a core.
    longest_hold = 1.0

    def make_stager(self) -> CheckpointStager:
        return DeepCopyStager()


class LosesItsCore(DeepCopyStager):
    """Its thread still holds the result when that is awaited already, as one does that waits for a core."""

    async def stage(self, state_dict: Any) -> Any:
        loop = asyncio.get_running_loop()
        copied = loop.create_future()

        def work() -> None:
            result = copy.deepcopy(state_dict)
            loop.call_soon_threadsafe(copied.set_result, result)
            time.sleep(0.05)

        threading.Thread(target=work).start()
        return await copied


@pytest.mark.asyncio
async def test_a_thread_that_waits_for_a_core_keeps_no_result_for_good() -> None:
    class Suite(StagerSuite):
        def make_stager(self) -> CheckpointStager:
            return LosesItsCore()

    await Suite().test_results_are_let_go_of()


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


def walk(tree: Any) -> list[torch.Tensor]:
    """Return the tensors in dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for child in children for tensor in walk(child)]


class AliasesScalars(DeepCopyStager):
    async def stage(self, state_dict: Any) -> Any:
        staged = await super().stage(state_dict)
        for copied, tensor in zip(walk(staged), walk(state_dict), strict=True):
            if not tensor.dim():
                copied.set_(tensor)
        return staged


class Ring(DeepCopyStager):
    """Has four buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Any] = []

    async def stage(self, state_dict: Any) -> Any:
        staged = await super().stage(state_dict)
        self.buffers.append(staged)
        if len(self.buffers) > 4:
            oldest = self.buffers.pop(0)
            for buffer, tensor in zip(walk(oldest), walk(staged), strict=True):
                buffer.copy_(tensor)
            self.buffers[-1] = oldest
            return oldest
        return staged


class LosesViews(DeepCopyStager):
    async def stage(self, state_dict: Any) -> Any:
        staged = await super().stage(state_dict)
        if isinstance(staged, dict):
            for name, value in staged.items():
                if type(value) is torch.Tensor:
                    staged[name] = value.clone()
        return staged


class Narrows(DeepCopyStager):
    async def stage(self, state_dict: Any) -> Any:
        staged = await super().stage(state_dict)
        for tensor in walk(staged):
            if tensor.dtype is torch.float64:
                tensor.data = tensor.float()
        return staged


class NarrowsAndBack(DeepCopyStager):
    async def stage(self, state_dict: Any) -> Any:
        staged = await super().stage(state_dict)
        for tensor in walk(staged):
            if tensor.dtype is torch.float64:
                tensor.copy_(tensor.float())
        return staged


class LosesTheLast(DeepCopyStager):
    async def stage(self, state_dict: Any) -> Any:
        staged = await super().stage(state_dict)
        for tensor in walk(staged):
            if tensor.nbytes > 1 << 20:
                tensor.view(-1)[-1] = 0
        return staged


class ForgetsTheOrder(DeepCopyStager):
    async def stage(self, state_dict: Any) -> Any:
        staged = await super().stage(state_dict)
        if isinstance(staged, tuple) and "ordered" in staged[0]:
            staged[0]["ordered"] = dict(staged[0]["ordered"])
        return staged


class Holds(DeepCopyStager):
    async def stage(self, state_dict: Any) -> Any:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        return await super().stage(state_dict)


class Sleeps(DeepCopyStager):
    async def stage(self, state_dict: Any) -> Any:
        staged = await super().stage(state_dict)
        time.sleep(0.05)
        return staged


class Hoards(DeepCopyStager):
    def __init__(self) -> None:
        super().__init__()
        self.results: list[Any] = []

    async def stage(self, state_dict: Any) -> Any:
        self.results.append(await super().stage(state_dict))
        return self.results[-1]


class MixesMoments(DeepCopyStager):
    async def stage(self, state_dict: Any) -> Any:
        staged = {}
        for name, value in list(state_dict.items()):
            await asyncio.sleep(0)
            staged[name] = copy.deepcopy(value)
        return staged


@pytest.mark.one_loop
@pytest.mark.asyncio
async def test_a_thread_that_is_put_aside_while_it_is_timed_hides_no_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = waited = 0

    def pread(*_: object) -> bytes:
        nonlocal calls, waited
        calls += 1
        answer = b"0 %d 0" % waited
        if calls % 3 == 0:
            # As if others had the core just after the number was read.
            time.sleep(0.03)
            waited += 30_000_000
        return answer

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(AssertionError, match="kept from other tasks"):
        await check_holds(lambda: Sleeps().stage({}), 0.04)


@pytest.mark.one_loop
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
        (AliasesScalars, "test_leaves_of_every_kind"),
        (Ring, "test_results_keep_their_values"),
        (LosesViews, "test_views_stay_views"),
        (Narrows, "test_leaves_of_every_kind"),
        (NarrowsAndBack, "test_leaves_of_every_kind"),
        (LosesTheLast, "test_leaves_of_every_kind"),
        (ForgetsTheOrder, "test_containers_of_other_kinds"),
        (Holds, "test_the_event_loop_is_not_held"),
        (Sleeps, "test_the_event_loop_is_not_held"),
        (Hoards, "test_results_are_let_go_of"),
        (MixesMoments, "test_one_moment_or_an_error"),
        (naive.SkewedVersions, "test_one_moment_or_an_error"),
        (naive.Unwitnessed, "test_one_moment_or_an_error"),
    ],
)
async def test_the_suite_finds_what_is_wrong(stager: type[CheckpointStager], test: str) -> None:
    class Suite(StagerSuite):
        def make_stager(self) -> CheckpointStager:
            return stager()

    with pytest.raises(AssertionError):
        await getattr(Suite(), test)()
