"""Every public function that reads or writes tensors follows the streams that were current where it was called."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from anyio.from_thread import start_blocking_portal
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager
from torch.distributed.checkpoint.staging import StagingOptions as TorchOptions

import aiostage
from aiostage import AsyncStager, StagingOptions, adapt, blocking, dcp
from aiostage.checkpoint import register
from aiostage.integrations.lightning import AiostageCheckpointIO
from aiostage.storage import LocalStorage

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]

SIZE = 30_000
OLD, LATE, SAVED = 1.0, 7.0, 3.0
LATE_MICROSECONDS = 30_000

Tree = dict[str, torch.Tensor]


@contextmanager
def late_write(tensor: torch.Tensor) -> Iterator[None]:
    """Make a stream of the user's current, on which a write to a tensor waits to be carried out."""
    stream = torch.Stream(tensor.device)
    stream.wait_stream(torch.accelerator.current_stream(tensor.device))
    with stream:
        torch.simgpu.sleep(LATE_MICROSECONDS, tensor.device.index)  # type: ignore[attr-defined]
        tensor.fill_(LATE)
        yield


def live(device: str = "simgpu:0") -> Tree:
    tree = {"a": torch.full((SIZE,), OLD, device=device)}
    torch.simgpu.drain()  # type: ignore[attr-defined]
    return tree


def check(tree: Tree, value: float) -> None:
    torch.simgpu.drain()  # type: ignore[attr-defined]
    found = tree["a"].cpu().unique().tolist()
    assert found == [value]


# Reading: each takes a live tree and returns what makes a staged or saved one, to be called on the user's stream.


def stage(tree: Tree, path: Path) -> Awaitable[Tree]:
    stager = AsyncStager()
    return _closing(stager, stager.stage(tree))


class CopiesItself:
    """Is copied in the last step of a walk, and its tensors with it."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesItself:
        return CopiesItself(copy.deepcopy(self.tensors, memo))


def stage_what_copies_itself(tree: Tree, path: Path) -> Awaitable[Tree]:
    """In a step long after the call."""
    stager = AsyncStager(StagingOptions(max_loop_hold=1e-9))
    return _closing(stager, _unpacked(stager.stage({"object": CopiesItself([tree["a"]]), "more": list(range(999))})))


def snapshot(tree: Tree, path: Path) -> Awaitable[Tree]:
    stager = AsyncStager()
    return _closing(stager, _result(stager.snapshot(tree)))


def adapted_default(tree: Tree, path: Path) -> Awaitable[Tree]:
    stager = adapt(DefaultStager(TorchOptions(False, False, True, False)))
    return _closing(stager, stager.stage(tree))


def adapted_blocking(tree: Tree, path: Path) -> Awaitable[Tree]:
    stager = adapt(BlockingAsyncStager())
    return _closing(stager, stager.stage(tree))


def save(tree: Tree, path: Path) -> Awaitable[Tree]:
    return _then_load(aiostage.save(tree, path / "saved"), path / "saved")


def dcp_save(tree: Tree, path: Path) -> Awaitable[Tree]:
    return _then_dcp_load(dcp.save(tree, checkpoint_id=path / "saved", no_dist=True), path / "saved")


def dcp_start_save(tree: Tree, path: Path) -> Awaitable[Tree]:
    saving = dcp.start_save(tree, checkpoint_id=path / "saved", no_dist=True)
    return _then_dcp_load(saving.committed(), path / "saved")


def dcp_storage_writer(tree: Tree, path: Path) -> Awaitable[Tree]:
    """DCP's own save, to a storage of ours."""
    torch_dcp.save(tree, checkpoint_id="saved", storage_writer=dcp.StorageWriter(path), no_dist=True)
    into = {"a": torch.zeros(SIZE)}
    torch_dcp.load(into, checkpoint_id="saved", storage_reader=dcp.StorageReader(path), no_dist=True)
    return _done(into)


def torch_stager(tree: Tree, path: Path) -> Awaitable[Tree]:
    stager = dcp.TorchStager()
    future = stager.stage(tree)
    return _closing_torch(stager, future)


def checkpointer_save(tree: Tree, path: Path) -> Awaitable[Tree]:
    checkpoints = blocking.Checkpointer(path / "saved")
    with checkpoints:
        checkpoints.save(0, tree).committed()
        loaded = checkpoints.restore()
    return _done(loaded)


def blocking_stage(tree: Tree, path: Path) -> Awaitable[Tree]:
    with blocking.Stager() as stager:
        return _done(stager.stage(tree))


def blocking_snapshot(tree: Tree, path: Path) -> Awaitable[Tree]:
    with blocking.Stager() as stager, stager.snapshot(tree) as taken:
        return _done(taken.result())


def blocking_save(tree: Tree, path: Path) -> Awaitable[Tree]:
    blocking.save(tree, path / "saved")
    return _done(blocking.load(path / "saved"))


def blocking_publish(tree: Tree, path: Path) -> Awaitable[Tree]:
    with blocking.WeightPublisher(LocalStorage(path)) as publisher:
        publisher.publish(tree)
        with blocking.WeightSubscriber(LocalStorage(path), interval=0.01) as weights:
            return _done(weights.get().state_dict)


def lightning_save(tree: Tree, path: Path) -> Awaitable[Tree]:
    plugin = AiostageCheckpointIO()
    plugin.save_checkpoint(tree, path / "saved")
    plugin.teardown()
    return _done(blocking.load(path / "saved"))


READERS = [
    stage,
    stage_what_copies_itself,
    snapshot,
    adapted_default,
    adapted_blocking,
    save,
    dcp_save,
    dcp_start_save,
    dcp_storage_writer,
    torch_stager,
    checkpointer_save,
    blocking_stage,
    blocking_snapshot,
    blocking_save,
    blocking_publish,
    lightning_save,
]


# Writing: each takes a live tree and where a checkpoint is, and returns what has put the checkpoint's values into it.


def load_into(tree: Tree, path: Path) -> Awaitable[object]:
    return aiostage.load(path / "checkpoint", into=tree)


class Stateful:
    """Loads its own state."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def state_dict(self) -> Tree:
        return self.tree

    def load_state_dict(self, state: Tree) -> None:
        self.tree["a"].copy_(state["a"], non_blocking=True)
        torch.accelerator.current_stream(self.tree["a"].device).synchronize()


def load_into_an_object(tree: Tree, path: Path) -> Awaitable[object]:
    return aiostage.load(path / "stateful", into={"model": Stateful(tree)})


def load_in_place(tree: Tree, path: Path) -> Awaitable[object]:
    return aiostage.load(path / "checkpoint", into=tree, in_place=True)


def checkpointer_restore(tree: Tree, path: Path) -> Awaitable[object]:
    return aiostage.Checkpointer(path / "run").restore(tree)


def checkpointer_restore_in_place(tree: Tree, path: Path) -> Awaitable[object]:
    return aiostage.Checkpointer(path / "run").restore(tree, in_place=True)


def blocking_restore(tree: Tree, path: Path) -> Awaitable[object]:
    with blocking.Checkpointer(path / "run") as checkpoints:
        return _done(checkpoints.restore(tree))


def blocking_restore_in_place(tree: Tree, path: Path) -> Awaitable[object]:
    with blocking.Checkpointer(path / "run") as checkpoints:
        return _done(checkpoints.restore(tree, in_place=True))


def restore(tree: Tree, path: Path) -> Awaitable[object]:
    stager = AsyncStager()
    return _closing(stager, stager.restore({"a": torch.full((SIZE,), SAVED)}, into=tree))


def dcp_load(tree: Tree, path: Path) -> Awaitable[object]:
    return dcp.load(tree, checkpoint_id=path / "dcp", no_dist=True)


def blocking_load(tree: Tree, path: Path) -> Awaitable[object]:
    return _done(blocking.load(path / "checkpoint", into=tree))


def blocking_load_in_place(tree: Tree, path: Path) -> Awaitable[object]:
    return _done(blocking.load(path / "checkpoint", into=tree, in_place=True))


def blocking_stager_restore(tree: Tree, path: Path) -> Awaitable[object]:
    with blocking.Stager() as stager:
        stager.restore({"a": torch.full((SIZE,), SAVED)}, into=tree)
    return _done(None)


def dcp_storage_reader(tree: Tree, path: Path) -> Awaitable[object]:
    """DCP's own load, from a storage of ours."""
    reader = dcp.StorageReader(path / "dcp_run")
    torch_dcp.load(tree, checkpoint_id="step-00000001", storage_reader=reader, no_dist=True)
    return _done(None)


def dcp_checkpointer_restore(tree: Tree, path: Path) -> Awaitable[object]:
    return dcp.Checkpointer(path / "dcp_run", no_dist=True).restore(tree)


WRITERS = [
    load_into,
    load_into_an_object,
    load_in_place,
    checkpointer_restore,
    checkpointer_restore_in_place,
    blocking_restore,
    blocking_restore_in_place,
    restore,
    dcp_load,
    blocking_load,
    blocking_load_in_place,
    blocking_stager_restore,
    dcp_storage_reader,
    dcp_checkpointer_restore,
]

BLOCKING = {
    dcp_storage_writer,
    dcp_storage_reader,
    checkpointer_save,
    blocking_stage,
    blocking_snapshot,
    blocking_save,
    blocking_publish,
    lightning_save,
    blocking_restore,
    blocking_restore_in_place,
    blocking_load,
    blocking_load_in_place,
    blocking_stager_restore,
}
"""What is not called on an event loop."""


async def _done(value: Any) -> Any:
    return value


async def _unpacked(staging: Awaitable[Any]) -> Tree:
    return {"a": (await staging)["object"].tensors[0]}


async def _closing(stager: aiostage.CheckpointStager, work: Awaitable[Any]) -> Any:
    async with stager:
        return await work


async def _closing_torch(stager: dcp.TorchStager, future: Any) -> Any:
    try:
        return await asyncio.wrap_future(future)
    finally:
        await asyncio.to_thread(stager.close)


async def _result(staging: Any) -> Any:
    async with staging as handle:
        return await handle.result()


async def _then_load(saving: Awaitable[object], path: Path) -> Any:
    await saving
    return await aiostage.load(path)


async def _then_dcp_load(saving: Awaitable[object], path: Path) -> Any:
    await saving
    into = {"a": torch.zeros(SIZE)}
    await dcp.load(into, checkpoint_id=path, no_dist=True)
    return into


# From where they are called: each calls on a user's stream with a late write, and awaits elsewhere.


def in_a_task(call: Callable[[], Awaitable[Any]], tree: Tree) -> Any:
    async def main() -> Any:
        with late_write(tree["a"]):
            task = asyncio.ensure_future(call())
        return await task

    return asyncio.run(main())


def in_a_thread(call: Callable[[], Awaitable[Any]], tree: Tree) -> Any:
    """Called in a thread, awaited by a loop in another."""

    async def main() -> Any:
        made: list[Awaitable[Any]] = []

        def work() -> None:
            with late_write(tree["a"]):
                made.append(call())

        thread = threading.Thread(target=work)
        thread.start()
        await asyncio.to_thread(thread.join)
        return await made[0]

    return asyncio.run(main())


def through_a_portal(call: Callable[[], Awaitable[Any]], tree: Tree) -> Any:
    with start_blocking_portal() as portal, late_write(tree["a"]):
        made = call()
        return portal.call(lambda: made)


def on_another_loop(call: Callable[[], Awaitable[Any]], tree: Tree) -> Any:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        with late_write(tree["a"]):
            return asyncio.run_coroutine_threadsafe(_awaited(call()), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work


WAYS = [in_a_task, in_a_thread, through_a_portal, on_another_loop]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints")
    tree = {"a": torch.full((SIZE,), SAVED)}

    async def main() -> None:
        await aiostage.save(tree, path / "checkpoint")
        await aiostage.save({"model": tree}, path / "stateful")
        await dcp.save(tree, checkpoint_id=path / "dcp", no_dist=True)
        async with (
            aiostage.Checkpointer(path / "run") as run,
            dcp.Checkpointer(path / "dcp_run", no_dist=True) as ranks,
        ):
            await (await run.save(1, tree)).committed()
            await (await ranks.save(1, tree)).committed()

    asyncio.run(main())
    return path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reader", READERS)
class TestReading:
    def test_sees_a_write_that_was_queued_before_the_call(self, way: Any, reader: Any, tmp_path: Path) -> None:
        if way is in_a_task and reader in BLOCKING:
            pytest.skip("what blocks is not called on an event loop")
        tree = live()
        check(way(partial(reader, tree, tmp_path), tree), LATE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("writer", WRITERS)
class TestWriting:
    def test_comes_after_a_write_that_was_queued_before_the_call(
        self, way: Any, writer: Any, checkpoints: Path
    ) -> None:
        if way is in_a_task and writer in BLOCKING:
            pytest.skip("what blocks is not called on an event loop")
        tree = live()
        way(partial(writer, tree, checkpoints), tree)
        check(tree, SAVED)


class TestLoadingToADevice:
    def test_memory_is_the_stream_s_that_was_current_at_the_call(self, checkpoints: Path) -> None:
        user = torch.Stream("simgpu:0")
        with user, blocking.Checkpointer(checkpoints / "run") as run:
            before = torch.empty(SIZE, device="simgpu:0")
            torch.simgpu.sleep(LATE_MICROSECONDS, 0)  # type: ignore[attr-defined]
            before.fill_(9)
            address = before.data_ptr()
            del before
            loaded = run.restore(device="simgpu:0")
            assert loaded["a"].data_ptr() == address
            check(loaded, SAVED)


@pytest.mark.asyncio
class TestRestoringFromADevice:
    """From staged trees with tensors on devices: passed through, or live ones."""

    @pytest.mark.parametrize("source", ["simgpu:0", "simgpu:1"])
    @pytest.mark.parametrize("target", ["simgpu:0", "cpu"])
    async def test_values_that_are_written_late(self, source: str, target: str) -> None:
        values, into = live(source), {"a": torch.full((SIZE,), OLD, device=target)}
        async with AsyncStager() as stager:
            with late_write(values["a"]):
                restoring = stager.restore(values, into=into)
            await restoring
        check(into, LATE)

    async def test_two_trees_that_swap(self) -> None:
        first, second = live(), live("simgpu:1")
        second["a"].fill_(2)
        tree = {"x": first["a"], "y": second["a"]}
        async with AsyncStager() as stager:
            await stager.restore({"x": second["a"], "y": first["a"]}, into=tree)
        check(first, 2)
        check(second, OLD)

    async def test_a_tensor_that_was_passed_through(self) -> None:
        tree = live() | {"b": torch.zeros(3)}
        options = aiostage.StagingOptions(passthrough=lambda path, value: path == ("a",))
        async with AsyncStager(options) as stager:
            staged = await stager.stage(tree)
            assert staged["a"] is tree["a"]
            tree["b"].fill_(1)
            await stager.restore(staged, into=tree)
        check(tree, OLD)
        assert tree["b"].tolist() == [0, 0, 0]


class Doubled:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.asyncio
async def test_objects_are_made_again_on_the_callers_stream(tmp_path: Path) -> None:
    """What a user's function enqueues while a tree is made is in order for the caller, as the loaded tensors are."""
    streams: list[torch.Stream] = []

    def unflatten(children: list[torch.Tensor], context: object) -> Doubled:
        streams.append(torch.accelerator.current_stream(children[0].device))
        return Doubled(children[0] * 2)

    register(Doubled, lambda doubled: ([doubled.tensor], None), unflatten)
    await aiostage.save({"a": Doubled(torch.full((SIZE,), SAVED))}, tmp_path / "a")
    live()
    stream = torch.Stream("simgpu:0")
    with stream:
        coroutine = aiostage.load(tmp_path / "a", device="simgpu:0")
    tree = await coroutine
    assert streams == [stream]
    check({"a": tree["a"].tensor}, 2 * SAVED)
