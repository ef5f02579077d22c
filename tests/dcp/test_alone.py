"""One process, without process groups."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from aiostage import AsyncStager, RankFailedError, StagerClosedError, StagingError, UnsupportedLeafError, adapt, dcp
from tests.checkpoint.test_fit import Raising
from tests.device.accelerators import default_stager_stages_again
from tests.staging.holding import copies_held, until_copies_wait

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning"),
]


class Slow(FileSystemWriter):
    """Writes when told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def write_data(self, plan: Any, planner: Any) -> Any:
        self._loop.call_soon_threadsafe(self.begun.set)
        asyncio.run_coroutine_threadsafe(self.go.wait(), self._loop).result(20)
        return super().write_data(plan, planner)


class Wrapped:
    """Hands all that it is asked for to another, and is not of its class."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.asyncio
class TestSaveAndLoad:
    async def test_round_trip(self, tmp_path: Path) -> None:
        state = {"a": torch.arange(4.0), "nested": {"step": 3}}
        metadata = await dcp.save(state, checkpoint_id=tmp_path / "a")
        assert sorted(metadata.state_dict_metadata) == ["a", "nested.step"]
        into = {"a": torch.zeros(4), "nested": {"step": 0}}
        tensor = into["a"]
        await dcp.load(into, checkpoint_id=tmp_path / "a")
        assert into["a"] is tensor
        assert tensor.tolist() == [0, 1, 2, 3]  # type: ignore[attr-defined]
        assert into["nested"] == {"step": 3}
        plain = {"a": torch.zeros(4)}
        checkpoint.load(plain, checkpoint_id=tmp_path / "a", no_dist=True)
        assert plain["a"].tolist() == [0, 1, 2, 3]

    async def test_only_long_records_are_read_through_views(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A view costs calls and system calls for each of the twenty reads of a record."""
        views = []
        make_view = filesystem._create_file_view

        def counted(file: Any, offset: int, length: int) -> Any:
            views.append(length)
            return make_view(file, offset, length)

        monkeypatch.setattr(filesystem, "_create_file_view", counted)
        state = {"long": torch.arange(1 << 18), "short": torch.arange(5.0), "values": {"step": 3}}
        state["empty"] = torch.ones(0)
        await dcp.save(state, checkpoint_id=tmp_path / "a")
        into = {"long": torch.zeros(1 << 18, dtype=torch.long), "short": torch.zeros(5), "values": {"step": 0}}
        into["empty"] = torch.zeros(0)
        await dcp.load(into, checkpoint_id=tmp_path / "a")
        assert torch.equal(into["long"], state["long"])  # type: ignore[arg-type]
        assert torch.equal(into["short"], state["short"])  # type: ignore[arg-type]
        assert into["values"] == {"step": 3}
        assert len(views) == 1
        assert views[0] > 1 << 21

    async def test_a_reader_of_pytorch_that_slices_otherwise_is_used_as_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What it asks by more than a file and an entry can mean something else."""
        slice_file: Any = FileSystemReader._slice_file  # type: ignore[attr-defined]
        asked = []

        def later(self: FileSystemReader, file: Any, sinfo: Any, *more: Any) -> Any:
            asked.append(sinfo.length)
            return slice_file(self, file, sinfo)

        monkeypatch.setattr(FileSystemReader, "_slice_file", later)
        await dcp.save({"a": torch.ones(5)}, checkpoint_id=tmp_path / "a")
        into = {"a": torch.zeros(5)}
        await dcp.load(into, checkpoint_id=tmp_path / "a")
        assert into["a"].tolist() == [1] * 5
        assert len(asked) == 1

    @pytest.mark.parametrize("length", [-1, 0, 500, 1 << 21])
    async def test_a_wrong_length_of_a_record_is_an_error(self, tmp_path: Path, length: int) -> None:
        """Also one that reaches over the next records, or means all of the rest."""
        await dcp.save({"a": torch.ones(5), "b": torch.ones(5)}, checkpoint_id=tmp_path / "a")
        path = tmp_path / "a" / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        for index, place in metadata.storage_data.items():
            if index.fqn == "a":
                place.length = length
        path.write_bytes(pickle.dumps(metadata))
        into = {"a": torch.zeros(5), "b": torch.zeros(5)}
        with pytest.raises(RankFailedError):
            await dcp.load(into, checkpoint_id=tmp_path / "a")
        assert into["a"].tolist() == [0] * 5

    async def test_an_object_that_raises_when_asked_for_a_state(self, tmp_path: Path) -> None:
        """It is no Stateful, for PyTorch's save neither."""
        state = {"a": Raising(), "b": torch.ones(2)}
        metadata = await dcp.save(state, checkpoint_id=tmp_path / "a")
        assert sorted(metadata.state_dict_metadata) == ["a", "b"]
        checkpoint.save(state, checkpoint_id=tmp_path / "b", no_dist=True)

    async def test_values_come_back_under_keys_that_are_no_text(self, tmp_path: Path) -> None:
        def make(gamma: float) -> tuple[Any, Any]:
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=gamma)
            return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5], gamma=gamma)

        (_, saved), (_, loaded) = make(0.5), make(0.25)
        values = {"a": {3: {"x": [1, {7: "seven"}], 4: torch.ones(2)}, "b": 5, (1, 2): None}, "scheduler": saved}
        await dcp.save(values, checkpoint_id=tmp_path / "a")
        live = {"a": {3: {"x": [0, {7: ""}], 4: torch.zeros(2)}, "b": 0, (1, 2): 0}, "scheduler": loaded}
        tensor = live["a"][3][4]  # type: ignore[index]
        await dcp.load(live, checkpoint_id=tmp_path / "a")
        assert tensor.tolist() == [1, 1]
        assert live["a"] == {3: {"x": [1, {7: "seven"}], 4: tensor}, "b": 5, (1, 2): None}
        assert loaded.state_dict() == saved.state_dict()
        assert loaded.milestones == {3: 2, 5: 1}
        # What came back can be saved again.
        await dcp.save(live, checkpoint_id=tmp_path / "b")

    async def test_the_moment_is_the_call(self, tmp_path: Path) -> None:
        class Model:
            def __init__(self) -> None:
                self.weights = [torch.ones(2)]

            def state_dict(self) -> dict[str, Any]:
                return {"w": self.weights[-1]}

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                self.weights = [state_dict["w"]]

        model = Model()
        coroutine = dcp.save({"model": model}, checkpoint_id=tmp_path / "a")
        model.weights.append(torch.zeros(2))
        await coroutine
        await dcp.load({"model": model}, checkpoint_id=tmp_path / "a")
        assert model.weights[0].tolist() == [1, 1]

    async def test_training_goes_on_once_captured(self, tmp_path: Path) -> None:
        weights = torch.ones(1000)
        writer = Slow(tmp_path / "a")
        saving = dcp.start_save({"w": weights}, storage_writer=writer)
        await saving.captured()
        weights.zero_()
        await writer.begun.wait()
        writer.go.set()
        await asyncio.gather(saving.committed(), saving.committed())
        into = {"w": torch.zeros(1000)}
        await dcp.load(into, checkpoint_id=tmp_path / "a")
        assert into["w"].sum() == 1000

    async def test_saves_in_flight_keep_their_memory(self, tmp_path: Path) -> None:
        weights = torch.zeros(1000)
        async with AsyncStager() as stager:
            writers, savings = [], []
            for number in range(3):
                weights.fill_(number)
                writers.append(Slow(tmp_path / str(number)))
                savings.append(dcp.start_save({"w": weights}, storage_writer=writers[-1], stager=stager))
                await savings[-1].captured()
            assert stager.statistics().leases == 3
            for writer, saving in zip(writers, savings, strict=True):
                writer.go.set()
                await saving.committed()
            for number in range(3):
                into = {"w": torch.zeros(1000)}
                await dcp.load(into, checkpoint_id=tmp_path / str(number))
                assert into["w"].unique().tolist() == [number]
            assert stager.statistics().leases == 0

    async def test_a_failed_writer(self, tmp_path: Path) -> None:
        class Breaks(FileSystemWriter):
            def write_data(self, plan: Any, planner: Any) -> Any:
                planner.resolve_data(plan.items[0])
                raise OSError(28, "No space left on device")

        async with AsyncStager() as stager:
            with pytest.raises(RankFailedError, match=r"rank 0 failed: OSError: .*No space left") as raised:
                await dcp.save({"w": torch.ones(9)}, storage_writer=Breaks(tmp_path / "a"), stager=stager)
            # While the error is held, the staged memory is not.
            assert stager.statistics().leases == 0
        assert not raised.value.lost

    async def test_staging_errors_come_as_they_are(self, tmp_path: Path) -> None:
        saving = dcp.start_save({"w": torch.ones(2, device="meta")}, checkpoint_id=tmp_path / "a")
        for _ in range(2):
            with pytest.raises(UnsupportedLeafError):
                await saving.captured()
            with pytest.raises(UnsupportedLeafError):
                await saving.committed()
        assert not list(tmp_path.iterdir())

    async def test_closed_stager(self, tmp_path: Path) -> None:
        stager = AsyncStager()
        await stager.aclose()
        with pytest.raises(StagerClosedError):
            await dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "a", stager=stager)

    async def test_missing_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(RankFailedError, match="No such file"):
            await dcp.load({"w": torch.ones(2)}, checkpoint_id=tmp_path / "a")

    async def test_missing_checkpoint_where_pytorch_does_not_say_why(self, tmp_path: Path) -> None:
        """PyTorch 2.11 keeps the error of the first look to itself: the reader is asked again."""

        class SaysNothingAtFirst(FileSystemReader):
            looked = False

            def read_metadata(self, **_: Any) -> Any:
                if self.looked:
                    return super().read_metadata()
                self.looked = True
                return None

        with pytest.raises(RankFailedError, match=r"metadata is None; .*No such file"):
            await dcp.load({"w": torch.ones(2)}, storage_reader=SaysNothingAtFirst(tmp_path / "a"))

    async def test_takes_what_wraps_others(self, tmp_path: Path) -> None:
        writer: Any = Wrapped(FileSystemWriter(tmp_path / "a"))
        reader: Any = Wrapped(FileSystemReader(tmp_path / "a"))
        planners: Any = [Wrapped(DefaultSavePlanner()), Wrapped(DefaultLoadPlanner())]
        target = {"w": torch.zeros(2)}
        await dcp.save({"w": torch.ones(2)}, storage_writer=writer, planner=planners[0])
        await dcp.load(target, storage_reader=reader, planner=planners[1])
        assert target["w"].tolist() == [1.0, 1.0]

    async def test_ids_of_other_classes_are_for_the_storage_of_the_caller(self, tmp_path: Path) -> None:
        class OfNumbers:
            def reset(self, checkpoint_id: Any = None) -> None:
                super().reset(None if checkpoint_id is None else tmp_path / f"run-{checkpoint_id}")  # type: ignore[misc]

        class Writer(OfNumbers, FileSystemWriter):
            pass

        class Reader(OfNumbers, FileSystemReader):
            pass

        target, number = {"w": torch.zeros(2)}, cast("str", 7)
        await dcp.save({"w": torch.ones(2)}, checkpoint_id=number, storage_writer=Writer(tmp_path / "a"))
        await dcp.load(target, checkpoint_id=number, storage_reader=Reader(tmp_path / "a"), no_dist=np.True_)
        assert target["w"].tolist() == [1.0, 1.0]
        assert (tmp_path / "run-7").is_dir()

    @pytest.mark.parametrize("timeout", [np.float32(30), np.int64(30), Fraction(30), Decimal(30), 30], ids=repr)
    async def test_a_timeout_of_any_class(self, timeout: Any, tmp_path: Path) -> None:
        target = {"w": torch.zeros(2)}
        await dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "a", timeout=timeout)
        await dcp.load(target, checkpoint_id=tmp_path / "a", timeout=timeout)
        assert target["w"].tolist() == [1.0, 1.0]

    @pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan"), 10**400])
    async def test_refuses(self, tmp_path: Path, timeout: float) -> None:
        with pytest.raises(TypeError, match="stager must be a CheckpointStager"):
            await dcp.save({}, checkpoint_id="x", stager=3, no_dist=True)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="a dict of names, not list"):
            await dcp.save([], checkpoint_id="x", no_dist=True)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="timeout must be a number of seconds above 0"):
            dcp.save({}, checkpoint_id=tmp_path / "a", timeout=timeout)
        for name in ("checkpoint_id", "storage_writer", "planner", "no_dist"):
            with pytest.raises(TypeError, match=f"{name} must be "):
                dcp.save({}, **{"checkpoint_id": tmp_path / "a", name: 3})  # type: ignore[arg-type]
        for name in ("checkpoint_id", "storage_reader", "planner", "no_dist"):
            with pytest.raises(TypeError, match=f"{name} must be "):
                dcp.load({}, **{"checkpoint_id": tmp_path / "a", name: 3})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="storage_writer must be a StorageWriter of DCP"):
            dcp.save({}, storage_writer=FileSystemWriter)  # type: ignore[arg-type]
        for into in (None, [], "abc"):
            with pytest.raises(TypeError, match="a state dict to load into is a dict of names, not "):
                dcp.load(into, checkpoint_id=tmp_path / "a")  # type: ignore[arg-type]
        for wrong in (None, "60", [1], True):
            with pytest.raises(TypeError, match="timeout must be a number of seconds, not "):
                dcp.save({}, checkpoint_id=tmp_path / "a", timeout=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="needs a checkpoint_id or a storage_writer"):
            dcp.save({})
        with pytest.raises(ValueError, match="needs a checkpoint_id or a storage_reader"):
            dcp.load({})


def _default_stager() -> Any:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    return DefaultStager(StagingOptions(False, False, True, False))


def _experimental_stager() -> Any:
    from torch.distributed.checkpoint._experimental.staging import CheckpointStagerConfig, DefaultStager

    return DefaultStager(CheckpointStagerConfig(False, False, True, False))


def _blocking_stager() -> Any:
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    return BlockingAsyncStager()


@pytest.mark.asyncio
@pytest.mark.parametrize("make", [_default_stager, _experimental_stager, _blocking_stager])
async def test_with_pytorchs_stagers(tmp_path: Path, make: Callable[[], Any]) -> None:
    """One after the other, because they overwrite what they have returned before."""
    weights = torch.zeros(100)
    again = make is not _default_stager or default_stager_stages_again()
    async with adapt(make()) as stager:
        for number in range(3 if again else 1):
            weights.fill_(number)
            saving = dcp.start_save({"w": weights}, checkpoint_id=tmp_path / str(number), stager=stager)
            await saving.captured()
            weights.fill_(-1)
            await saving.committed()
            into = {"w": torch.zeros(100)}
            await dcp.load(into, checkpoint_id=tmp_path / str(number))
            assert into["w"].unique().tolist() == [number]
        if again:
            with pytest.raises(TypeError, match="cannot pickle"):
                await dcp.save({"bad": threading.Lock()}, checkpoint_id=tmp_path / "bad", stager=stager)


@pytest.mark.asyncio
class TestCancellation:
    async def test_while_writing_completes_first(self, tmp_path: Path) -> None:
        writer = Slow(tmp_path / "a")
        task = asyncio.ensure_future(dcp.save({"w": torch.ones(9)}, storage_writer=writer))
        await writer.begun.wait()
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        writer.go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (tmp_path / "a" / ".metadata").exists()

    async def test_while_another_save_is_written_gives_up(self, tmp_path: Path) -> None:
        writer = Slow(tmp_path / "a")
        async with AsyncStager() as stager:
            first = dcp.start_save({"w": torch.ones(9)}, storage_writer=writer)
            await first.captured()
            await writer.begun.wait()
            task = asyncio.ensure_future(dcp.save({"w": torch.ones(9)}, checkpoint_id=tmp_path / "b", stager=stager))
            while stager.statistics().stagings == 0:
                await asyncio.sleep(0)
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert stager.statistics().leases == 0
            writer.go.set()
            await first.committed()
        assert not (tmp_path / "b").exists()

    async def test_at_every_turn(self, tmp_path: Path) -> None:
        """Cancelled after any number of turns, it saves whole or not at all, keeps nothing, and the next save works."""
        async with AsyncStager() as stager:
            for turns in range(40):
                target = tmp_path / str(turns)
                task = asyncio.ensure_future(dcp.save({"w": torch.ones(9)}, checkpoint_id=target, stager=stager))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                if target.exists():
                    assert (target / ".metadata").exists()
                assert stager.statistics().leases == 0
            await dcp.save({"w": torch.ones(9)}, checkpoint_id=tmp_path / "last", stager=stager)

    async def test_waiting_may_be_cancelled_and_the_save_goes_on(self, tmp_path: Path) -> None:
        writer = Slow(tmp_path / "a")
        saving = dcp.start_save({"w": torch.ones(9)}, storage_writer=writer)
        await saving.captured()
        task = asyncio.ensure_future(saving.committed())
        await writer.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        writer.go.set()
        await saving.committed()
        assert (tmp_path / "a" / ".metadata").exists()

    async def test_while_staging_gives_up(self, tmp_path: Path) -> None:
        async with AsyncStager() as stager:
            with copies_held(stager):
                saving = dcp.start_save({"w": torch.ones(9)}, checkpoint_id=tmp_path / "a", stager=stager)
                task = asyncio.ensure_future(saving.captured())
                await until_copies_wait(stager)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            with pytest.raises(StagingError, match="cancelled before the state was captured"):
                await saving.committed()
        assert not (tmp_path / "a").exists()


@pytest.mark.asyncio
async def test_dropped(tmp_path: Path) -> None:
    saving = dcp.start_save({"w": torch.ones(9)}, checkpoint_id=tmp_path / "a")
    with pytest.warns(RuntimeWarning, match="dropped before it was awaited"):
        del saving
    coroutine = dcp.save({"w": torch.ones(9)}, checkpoint_id=tmp_path / "a")
    with pytest.warns(RuntimeWarning):
        del coroutine
    await dcp.save({"w": torch.ones(9)}, checkpoint_id=tmp_path / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.anyio
async def test_on_trio(tmp_path: Path) -> None:
    await dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "a")
    into = {"w": torch.zeros(2)}
    await dcp.load(into, checkpoint_id=tmp_path / "a")
    assert into["w"].tolist() == [1, 1]


@pytest.mark.asyncio
async def test_a_failed_rank_is_an_error_of_dcps_too(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError) as caught:
        await dcp.load({"w": torch.ones(2)}, checkpoint_id=tmp_path / "a")
    error = type(caught.value)({1: "OSError: no space"}, lost=True)
    for seen in (error, pickle.loads(pickle.dumps(error))):
        assert isinstance(seen, RankFailedError)
        assert isinstance(seen, CheckpointException)
        assert seen.failures == {1: "OSError: no space"}
        assert seen.lost
        assert "rank 1 failed: OSError: no space." in str(seen)
