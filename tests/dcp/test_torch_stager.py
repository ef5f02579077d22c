"""Our staging in PyTorch's savers."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import pickle
import threading
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.staging import AsyncStager as TorchAsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.utils._pytree import tree_leaves, tree_map

from aiostage import StagerClosedError, StagingOptions, UnsupportedLeafError
from aiostage.dcp import TorchStager
from tests.dcp.test_together import sharded
from tests.dcp.world import World
from tests.forking import run_forking
from tests.patience import seconds
from tests.warm import PYTHON, executable

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

WAITING = StagingOptions(use_async_staging=False)
SHARED = StagingOptions(use_shared_memory=True)


@pytest.fixture
def stager() -> Iterator[TorchStager]:
    stager = TorchStager()
    yield stager
    stager.close()


def loaded(path: Path, like: torch.Tensor) -> torch.Tensor:
    into = {"w": torch.zeros_like(like)}
    checkpoint.load(into, checkpoint_id=path, no_dist=True)
    return into["w"]


class TestAsyncSave:
    def test_future(self, stager: TorchStager, tmp_path: Path) -> None:
        assert isinstance(stager, TorchAsyncStager)
        weights = torch.arange(8.0)
        response = checkpoint.async_save(
            {"w": weights}, checkpoint_id=tmp_path / "a", async_stager=stager, no_dist=True
        )
        assert isinstance(response, AsyncSaveResponse)
        response.staging_completion.result(20)
        weights.zero_()
        response.upload_completion.result(20)
        assert loaded(tmp_path / "a", weights).tolist() == list(range(8))

    def test_waiting(self, tmp_path: Path) -> None:
        stager = TorchStager(WAITING)
        weights = torch.arange(8.0)
        future = checkpoint.async_save({"w": weights}, checkpoint_id=tmp_path / "a", async_stager=stager, no_dist=True)
        assert isinstance(future, Future)
        weights.zero_()
        future.result(20)
        assert loaded(tmp_path / "a", weights).tolist() == list(range(8))
        stager.close()

    @pytest.mark.asyncio
    async def test_with_a_running_loop(self, stager: TorchStager, tmp_path: Path) -> None:
        weights = torch.arange(8.0)
        response: Any = checkpoint.async_save(
            {"w": weights}, checkpoint_id=tmp_path / "a", async_stager=stager, no_dist=True
        )
        await asyncio.wrap_future(response.upload_completion)
        assert loaded(tmp_path / "a", weights).tolist() == list(range(8))

    def test_many_saves_at_once(self, stager: TorchStager, tmp_path: Path) -> None:
        weights, responses = torch.zeros(1000), []
        for number in range(5):
            weights.fill_(number)
            response: Any = checkpoint.async_save(
                {"w": weights}, checkpoint_id=tmp_path / str(number), async_stager=stager, no_dist=True
            )
            response.staging_completion.result(20)
            responses.append(response)
        for number, response in enumerate(responses):
            response.upload_completion.result(20)
            assert loaded(tmp_path / str(number), weights).unique().tolist() == [number]
        assert stager.statistics().stagings == 5


class TestStage:
    def test_no_result_is_overwritten(self, stager: TorchStager) -> None:
        weights = torch.zeros(100)
        staged = []
        for number in range(4):
            weights.fill_(number)
            staged.append(stager.stage({"w": weights}).result(20))
        assert [tree["w"].unique().tolist() for tree in staged] == [[0], [1], [2], [3]]
        assert stager.statistics().leases == 4
        staged.clear()
        gc.collect()
        # Of the latest, which the stager keeps for later calls.
        assert stager.statistics().leases == 1
        stager.close()
        gc.collect()
        assert stager.statistics().leases == 0

    def test_memory_is_used_again(self, stager: TorchStager) -> None:
        for _ in range(5):
            stager.stage({"w": torch.zeros(100)}).result(20)
        assert stager.statistics().arenas == 1

    def test_synchronize(self, stager: TorchStager) -> None:
        stager.synchronize_staging()
        future = stager.stage({"w": torch.zeros(100)})
        stager.synchronize_staging()
        assert future.done()
        failing = stager.stage({"w": torch.zeros(1, device="meta")})
        with pytest.raises(UnsupportedLeafError):
            stager.synchronize_staging()
        with pytest.raises(UnsupportedLeafError):
            failing.result(0)

    @pytest.mark.parametrize(
        "state",
        [{"w": torch.ones(2)}, OrderedDict(w=torch.ones(2)), [torch.ones(2)], defaultdict(int, w=torch.ones(2))],
        ids=lambda state: type(state).__name__,
    )
    @pytest.mark.parametrize("options", [None, SHARED], ids=["pageable", "shared"])
    def test_the_copy_has_the_type_of_the_original(self, state: Any, options: StagingOptions | None) -> None:
        stager = TorchStager(options)
        staged = stager.stage(state).result(20)
        assert type(staged) is type(state)
        assert stager.get_staged_state_dict() is staged
        cloned = tree_map(torch.clone, staged)
        (before,), (after,) = tree_leaves(staged), tree_leaves(cloned)
        assert after.data_ptr() != before.data_ptr()
        stager.close()

    def test_keywords_of_other_stagers(self, stager: TorchStager) -> None:
        assert stager.stage({"w": torch.ones(2)}, non_blocking=True).result(20)["w"].tolist() == [1, 1]

    def test_closing(self) -> None:
        stager = TorchStager()
        staged = stager.stage({"w": torch.ones(3)}).result(20)
        stager.close()
        stager.close()
        assert staged["w"].tolist() == [1, 1, 1]
        with pytest.raises(StagerClosedError):
            stager.stage({})

    def test_closing_waits_for_stagings_under_way(self) -> None:
        stager = TorchStager()
        futures = [
            stager.stage({"w": torch.full((4_000_000,), float(n)), "many": [torch.ones(9)] * 999}) for n in range(3)
        ]
        stager.close()
        assert [future.result(0)["w"].unique().tolist() for future in futures] == [[0], [1], [2]]

    def test_dropping_ends_the_thread(self) -> None:
        stager = TorchStager()
        stager.stage({"w": torch.ones(3)}).result(20)
        thread = stager._loop.thread
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del stager
            gc.collect()
            thread.join(20)
            gc.collect()
        assert [found.category for found in caught] == [ResourceWarning]
        assert not thread.is_alive()

    def test_a_stager_that_is_not_closed_keeps_no_interpreter_from_exiting(self) -> None:
        import subprocess

        program = "from aiostage.dcp import TorchStager; s = TorchStager(); print(s.stage({}).result(20))"
        done = subprocess.run([*PYTHON, "-c", program], check=True, timeout=seconds(50), capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("{}\n", "")

    def test_the_moment_is_the_callers(self) -> None:
        threads = []

        class Odd(dict[str, Any]):
            def items(self) -> Any:
                threads.append(threading.get_ident())
                return super().items()

        stager = TorchStager()
        stager.stage(Odd(a=torch.ones(2), b=1), ["b"]).result(20)
        assert threads[0] == threading.get_ident()
        stager.close()


class TestTorchCheckpointing:
    """The interface of ``torch_checkpointing``'s stagers."""

    def test_keys_not_requiring_copy(self, stager: TorchStager) -> None:
        kept, weights = object(), torch.ones(3)
        source = OrderedDict(a=weights, kept=kept, z=1)
        staged = stager.stage(source, keys_not_requiring_copy=["kept"]).result(20)
        assert type(staged) is OrderedDict
        assert list(staged) == ["a", "kept", "z"]
        assert staged["kept"] is kept
        weights.zero_()
        assert staged["a"].tolist() == [1, 1, 1]

    def test_get_staged_state_dict(self, stager: TorchStager) -> None:
        assert stager.get_staged_state_dict() is None
        staged = stager.stage({"w": torch.ones(3)}).result(20)
        assert stager.get_staged_state_dict() is staged
        del staged
        gc.collect()
        assert stager.get_staged_state_dict()["w"].tolist() == [1, 1, 1]
        assert stager.pinned_num_bytes() == 0
        failing = stager.stage({"w": torch.zeros(1, device="meta")})
        with pytest.raises(UnsupportedLeafError):
            failing.result(20)
        assert stager.get_staged_state_dict() is None

    def test_keys_that_are_not_there(self, stager: TorchStager) -> None:
        assert stager.stage({"a": 1}, ["a", "b"]).result(20) == {"a": 1}
        assert stager.stage([1], ["b"]).result(20) == [1]

    def test_attributes_of_the_dict_are_copied_beside_keys_not_requiring_copy(self, stager: TorchStager) -> None:
        state = torch.nn.Linear(1, 1).state_dict()
        staged = stager.stage(state, ["bias"]).result(20)
        assert staged._metadata == state._metadata
        assert staged._metadata is not state._metadata

    def test_it_is_all_that_a_stager_has_to_have(self, stager: TorchStager, tmp_path: Path) -> None:
        staging = pytest.importorskip("torch_checkpointing.staging", reason="torch-checkpointing is in the bench extra")
        missing = [name for name in staging.CheckpointStager.__abstractmethods__ if not hasattr(stager, name)]
        assert not missing

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [None, SHARED], ids=["sent", "shared"])
    def test_in_its_saver(self, tmp_path: Path, options: StagingOptions | None) -> None:
        reason = "torch-checkpointing is in the bench extra"
        builder = pytest.importorskip("torch_checkpointing.builder", reason=reason)
        base = pytest.importorskip("torch_checkpointing.checkpoint_base", reason=reason)
        staging = pytest.importorskip("torch_checkpointing.staging", reason=reason)

        class Items(base.CheckpointBase):  # type: ignore[misc]
            def get_items(self) -> dict[str, Any]:
                return {"model": base.CheckpointItem({"w": weights, "n": 3})}

            def load_state_dict(self, state_dict: Any) -> None:
                raise NotImplementedError

        weights, stager = torch.zeros(1000), TorchStager(options)
        saver = builder.make_async_checkpoint_saver(
            config=builder.AsyncCheckpointSaverConfig(
                staging_config=staging.CheckpointStagerConfig(False, False, False, False)
            ),
            # Its direct I/O fails on files whose size is not a multiple of the sector's.
            storage_config=builder.LocalFileSystemStorageConfig(use_direct_io=False),
        )
        # There is no argument for it.
        saver._checkpoint_stager.close()
        saver._checkpoint_stager = stager
        for number in range(3):
            weights.fill_(number)
            staged, written = saver.save(str(tmp_path / str(number)), Items())
            staged.result(seconds(40))
            weights.fill_(-1)
            written.result(seconds(40))
        saver.close()
        with pytest.raises(StagerClosedError):
            stager.stage({})
        for number in range(3):
            (file,) = (path for path in (tmp_path / str(number)).rglob("*model*") if path.is_file())
            assert torch.load(file, weights_only=True)["w"].unique().tolist() == [number]


class TestPickling:
    def test_plain(self, stager: TorchStager) -> None:
        staged = stager.stage({"w": torch.ones(3), "n": 3}).result(20)
        copy = pickle.loads(pickle.dumps(staged))
        assert type(copy) is dict
        assert copy["w"].tolist() == [1, 1, 1]

    def test_a_pickle_for_a_file_has_the_bytes(self, tmp_path: Path) -> None:
        stager = TorchStager(SHARED)
        staged = stager.stage({"w": torch.arange(100_000.0), "n": 3}).result(20)
        torch.save(staged, tmp_path / "saved")
        (tmp_path / "pickled").write_bytes(pickle.dumps(staged))
        stager.close()
        del staged, stager
        gc.collect()
        for read in (torch.load(tmp_path / "saved"), pickle.loads((tmp_path / "pickled").read_bytes())):
            assert torch.equal(read["w"], torch.arange(100_000.0))
            assert read["n"] == 3

    def test_a_pickle_for_a_process_has_a_descriptor(self) -> None:
        stager = TorchStager(SHARED)
        staged = stager.stage({"w": torch.ones(1_000_000), "n": 3}).result(20)
        pickled = bytes(ForkingPickler.dumps(staged))
        assert len(pickled) < 10_000
        copy = pickle.loads(pickled)
        assert copy["w"].sum() == 1_000_000
        assert copy["n"] == 3
        stager.close()


def in_another_process(path: str, options: StagingOptions | None, tensors: int) -> tuple[bool, int]:
    """Save by PyTorch's process executor, thrice with one stager."""
    # What PyTorch starts for it imports most of PyTorch otherwise.
    multiprocessing.set_executable(executable())
    stager = TorchStager(options)
    descriptors = 0
    for number in range(3):
        state: dict[str, Any] = {f"w{n}": torch.full((10,), float(number)) for n in range(tensors)}
        state["sharded"] = sharded(number)
        response: Any = checkpoint.async_save(
            state,
            checkpoint_id=f"{path}-{number}",
            async_stager=stager,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        response.staging_completion.result(seconds(40))
        before = len(os.listdir("/proc/self/fd"))
        for tensor in state.values():
            tensor.zero_()
        response.upload_completion.result(seconds(40))
        descriptors = max(descriptors, len(os.listdir("/proc/self/fd")) - before)
    stager.close()
    same = True
    for number in range(3):
        into: dict[str, Any] = {f"w{n}": torch.zeros(10) for n in range(tensors)}
        into["sharded"] = sharded(100)
        checkpoint.load(into, checkpoint_id=f"{path}-{number}")
        same &= all(into[f"w{n}"].unique().tolist() == [number] for n in range(tensors))
        same &= torch.equal(into["sharded"].to_local(), sharded(number).to_local())
    return same, descriptors


def stop_the_saver_process() -> None:
    from torch.distributed.checkpoint import _async_process_executor as executor

    executor._CHECKPOINT_PROCESS = None
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [pytest.param(None, id="sent", marks=pytest.mark.distributed_slow), pytest.param(SHARED, id="shared")],
)
def test_process_executor(pair: World, tmp_path: Path, options: StagingOptions | None) -> None:
    try:
        for same, descriptors in pair.run(in_another_process, str(tmp_path / "a"), options, 300):
            assert same
            if options is SHARED:
                assert descriptors < 10
    finally:
        pair.run(stop_the_saver_process)


def with_two_ranks(path: str) -> bool:
    stager = TorchStager()
    state = {"sharded": sharded(5)}
    response: Any = checkpoint.async_save(state, checkpoint_id=path, async_stager=stager)
    response.staging_completion.result(seconds(40))
    state["sharded"].to_local().zero_()
    response.upload_completion.result(seconds(40))
    stager.close()
    into = {"sharded": sharded(100)}
    checkpoint.load(into, checkpoint_id=path)
    dist.barrier()
    return torch.equal(into["sharded"].to_local(), sharded(5).to_local())


def test_thread_executor_with_two_ranks(pair: World, tmp_path: Path) -> None:
    assert pair.run(with_two_ranks, str(tmp_path / "a")) == [True, True]


FORKING = """
import torch
from aiostage import StagingError, dcp

stager = dcp.TorchStager()
assert stager.stage({"a": torch.ones(3)}).result()["a"].sum() == 3

def child():
    try:
        stager.stage({"a": torch.ones(3)})
    except StagingError as error:
        assert f"process {os.getppid()}" in str(error)
    else:
        raise AssertionError("it was taken")
    stager.close()

in_child(child)
assert stager.stage({"a": torch.ones(3)}).result()["a"].sum() == 3
stager.close()
"""


@pytest.mark.slow
def test_a_forked_child_gets_an_error_that_the_thread_is_its_parents() -> None:
    run_forking(FORKING)
