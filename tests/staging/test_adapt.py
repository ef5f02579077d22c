"""PyTorch's own stagers behind the coroutine interface."""

from __future__ import annotations

import asyncio
import threading
import warnings
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager
from torch.distributed.checkpoint.staging import StagingOptions as TorchStagingOptions

from aiostage import AsyncStager, CheckpointStager, StagerClosedError, StagingOptions, adapt

PLAIN = {"use_pinned_memory": False, "use_shared_memory": False, "use_non_blocking_copy": False}


@pytest.mark.asyncio
class TestAdapt:
    @pytest.mark.parametrize("use_async_staging", [False, True])
    async def test_default_stager(self, use_async_staging: bool):
        source = {"a": torch.arange(4.0), "b": [1, {"c": torch.ones(2)}]}
        async with adapt(DefaultStager(TorchStagingOptions(use_async_staging=use_async_staging, **PLAIN))) as stager:
            assert isinstance(stager, CheckpointStager)
            staged = await stager.stage(source)
            source["a"].zero_()  # type: ignore[attr-defined]
            assert staged["a"].tolist() == [0, 1, 2, 3]

    async def test_what_is_no_synchronous_stager(self):
        for given, reason in ((3, "not int"), (DefaultStager, "not its class DefaultStager"), (object(), "stage")):
            with pytest.raises(TypeError, match=reason):
                adapt(given)
        async with AsyncStager() as stager:
            with pytest.raises(TypeError, match="asynchronous already"):
                adapt(stager)

    async def test_blocking_async_stager(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            blocking = BlockingAsyncStager()
        async with adapt(blocking) as stager:
            assert (await stager.stage({"a": torch.ones(3)}))["a"].tolist() == [1, 1, 1]

    async def test_experimental_stager(self):
        from torch.distributed.checkpoint._experimental.staging import CheckpointStagerConfig
        from torch.distributed.checkpoint._experimental.staging import DefaultStager as Experimental

        config = CheckpointStagerConfig(use_async_staging=True, **PLAIN)
        async with adapt(Experimental(config)) as stager:
            assert (await stager.stage({"a": torch.ones(3)}))["a"].tolist() == [1, 1, 1]

    async def test_stages_one_at_a_time_off_the_loop(self):
        class Recorder:
            def __init__(self) -> None:
                self.threads: list[int] = []
                self.inside = 0
                self.closed = False

            def stage(self, state_dict: Any) -> Any:
                self.inside += 1
                assert self.inside == 1
                self.threads.append(threading.get_ident())
                self.inside -= 1
                return dict(state_dict)

            def close(self) -> None:
                self.closed = True

        recorder = Recorder()
        async with adapt(recorder) as stager:
            await asyncio.gather(*(stager.stage({"n": n}) for n in range(5)))
        assert recorder.closed
        assert len(set(recorder.threads)) == 1
        assert threading.get_ident() not in recorder.threads

    async def test_errors_come_through_and_it_works_on(self):
        class Fails:
            def stage(self, state_dict: Any) -> Any:
                if state_dict is None:
                    raise ValueError("nothing to stage")
                return state_dict

        async with adapt(Fails()) as stager:
            with pytest.raises(ValueError, match="nothing to stage"):
                await stager.stage(None)
            assert await stager.stage(3) == 3

    async def test_closed(self):
        stager = adapt(DefaultStager(TorchStagingOptions(use_async_staging=False, **PLAIN)))
        await stager.aclose()
        await stager.aclose()
        with pytest.raises(StagerClosedError):
            await stager.stage({})


def test_needs_a_stage_method() -> None:
    with pytest.raises(TypeError, match="stage\\(\\) method, not object"):
        adapt(object())


def test_options_of_pytorch_are_understood() -> None:
    ours = StagingOptions.from_torch(TorchStagingOptions(use_async_staging=False, **PLAIN))
    assert (ours.use_pinned_memory, ours.use_shared_memory, ours.use_async_staging) == (False, False, False)
