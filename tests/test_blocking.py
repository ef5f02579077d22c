from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

import aiostage
from aiostage import StagerClosedError, StagingError, StagingOptions
from aiostage.blocking import Checkpointer, Stager, load, save
from tests.forking import run_forking
from tests.patience import seconds


def state(number: int) -> dict[str, object]:
    return {"weight": torch.full((1000,), float(number)), "step": number}


def test_saves_restores_and_keeps_the_last(tmp_path: Path) -> None:
    others = set(threading.enumerate())
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        handles = [checkpoints.save(number, state(number)) for number in range(4)]
        infos = [handle.committed() for handle in handles]
        assert [info.nbytes for info in infos] == [4000] * 4
        assert checkpoints.latest() == 3
        assert torch.equal(checkpoints.restore()["weight"], torch.full((1000,), 3.0))
        live = state(0)
        assert checkpoints.restore(live, 2) is live
        assert live["step"] == 2
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        checkpoints.delete(2)
        assert checkpoints.steps() == [3]
    assert handles[0].committed() == infos[0], "also when it is over"
    assert all(handle.done() for handle in handles)
    assert "aiostage-checkpointer" not in [thread.name for thread in set(threading.enumerate()) - others]


def test_the_source_may_change_once_save_has_returned(tmp_path: Path) -> None:
    weight = torch.zeros(1 << 20)
    with Checkpointer(tmp_path, max_in_flight=4) as checkpoints:
        for number in range(4):
            checkpoints.save(number, {"weight": weight})
            weight += 1
    with Checkpointer(tmp_path) as checkpoints:
        for number in range(4):
            assert checkpoints.restore(step=number)["weight"].unique().tolist() == [number]


def test_leaving_waits_and_raises_failures(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state(1))
    assert (tmp_path / "step-00000001" / "manifest.json").is_file()
    with Checkpointer(tmp_path) as checkpoints, pytest.raises(aiostage.CheckpointExistsError):
        checkpoints.save(1, state(1))
    with pytest.raises(aiostage.UnsupportedLeafError), Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(2, {"no": object()})


def test_used_outside_its_block(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    with pytest.raises(aiostage.CheckpointError, match="not entered"):
        checkpoints.save(1, state(1))
    with checkpoints:
        pass
    with pytest.raises(aiostage.CheckpointError, match="not entered"):
        checkpoints.latest()
    checkpoints.close()


def test_close_does_what_leaving_does(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path).__enter__()
    handle = checkpoints.save(5, state(5))
    checkpoints.close()
    assert handle.done()
    checkpoints.close()


def test_an_error_in_the_block_does_not_lose_what_was_captured(tmp_path: Path) -> None:
    handles = []

    def train() -> None:
        with Checkpointer(tmp_path) as checkpoints:
            handles.append(checkpoints.save(1, state(1)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert handles[0].committed().nbytes == 4000


def test_signals_set_preempted_and_get_their_handlers_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Checkpointer(tmp_path, save_on_signals=[signal.SIGUSR1]) as checkpoints:
        assert not checkpoints.preempted.is_set()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert checkpoints.preempted.wait(seconds(10))
        checkpoints.save(1, state(1))
    assert signal.getsignal(signal.SIGUSR1) is before


def test_several_threads_may_save(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, max_in_flight=2) as checkpoints:
        threads = [threading.Thread(target=checkpoints.save, args=(number, state(number))) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.steps() == [0, 1, 2, 3]


def test_what_has_not_changed_is_not_written_again(tmp_path: Path) -> None:
    frozen = torch.rand(4 << 20)
    with Checkpointer(tmp_path, incremental=True) as checkpoints:
        for number in range(2):
            checkpoints.save(number, {"frozen": frozen, "step": number}).committed()
        sizes = [sum(file.stat().st_size for file in (tmp_path / f"step-0000000{n}").iterdir()) for n in range(2)]
        assert sizes[1] < sizes[0] / 100
        assert torch.equal(checkpoints.restore()["frozen"], frozen)


FORKING = """
import torch
from aiostage import CheckpointError
from aiostage import StagerClosedError, StagingError, StagingOptions
from aiostage.blocking import Checkpointer, Stager, load, save
from tests.forking import run_forking

def refused(call, *arguments):
    try:
        call(*arguments)
    except CheckpointError as error:
        assert f"entered by process {os.getppid()}" in str(error), error
    else:
        raise AssertionError(call)

def main(root):
    checkpoints = Checkpointer(root, save_on_signals=[signal.SIGTERM])
    with checkpoints:
        handle = checkpoints.save(1, {"a": torch.ones(3_000_000)})

        def child():
            refused(checkpoints.save, 2, {"a": torch.ones(3)})
            refused(checkpoints.latest)
            assert handle.done() or refused(handle.committed) is None
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            checkpoints.close()
            mine.clear()
            with Checkpointer(root) as own:
                own.save(os.getpid(), {"b": 1})

        mine = [Checkpointer(root).__enter__()]
        in_child(child)
        in_child(child)
        assert handle.committed().nbytes == 12_000_000
        mine.pop().close()
        assert len(checkpoints.steps()) == 3
        assert not checkpoints.preempted.is_set()

main("ROOT")
"""


@pytest.mark.slow
def test_a_forked_child_gets_an_error_and_may_have_its_own(tmp_path: Path) -> None:
    run_forking(FORKING.replace("ROOT", str(tmp_path)))


class TestStager:
    def test_stage_and_restore(self) -> None:
        live = state(1)
        with Stager() as stager:
            stager.prewarm(live)
            staged = stager.stage(live)
            live["weight"].zero_()
            assert staged["weight"].unique().tolist() == [1]
            stager.restore(staged, live)
            assert live["weight"].unique().tolist() == [1]
            assert stager.statistics().stagings == 2
        with pytest.raises(StagerClosedError):
            stager.stage(live)
        assert staged["weight"].unique().tolist() == [1]

    def test_share(self) -> None:
        with Stager(StagingOptions(use_shared_memory=True)) as stager:
            staged = stager.stage(state(1))
            assert stager.share(staged).open()["weight"].unique().tolist() == [1]

    def test_one_snapshot_for_two_targets(self, tmp_path: Path) -> None:
        live = state(1)
        with Stager() as stager, Checkpointer(tmp_path / "run", stager) as checkpoints:
            with stager.snapshot(live) as snapshot:
                snapshot.source_free(("weight",))
                snapshot.captured()
                assert snapshot.is_captured
                assert (snapshot.nbytes, snapshot.leaves) == (4000, 1)
                live["weight"].zero_()
                handle = checkpoints.save(1, snapshot)
                save(snapshot, tmp_path / "other")
            handle.committed()
            assert stager.statistics().stagings == 1
        for target in (tmp_path / "run" / "step-00000001", tmp_path / "other"):
            assert load(target)["weight"].unique().tolist() == [1]

    def test_a_snapshot_of_another_stager_is_refused(self, tmp_path: Path) -> None:
        stager, checkpoints = Stager(), Checkpointer(tmp_path)
        with stager, checkpoints, stager.snapshot({}) as snapshot, pytest.raises(StagingError, match="own stager"):
            checkpoints.save(1, snapshot)

    def test_it_is_used_inside_its_block(self, tmp_path: Path) -> None:
        others = set(threading.enumerate())
        stager = Stager()
        with pytest.raises(StagingError, match="not entered"):
            stager.stage({})
        with pytest.raises(StagingError, match="not entered"):
            Checkpointer(tmp_path, stager).__enter__()
        with stager:
            pass
        stager.close()
        with pytest.raises(StagingError, match="entered before"), stager:
            pass
        assert "aiostage-stager" not in [thread.name for thread in set(threading.enumerate()) - others]


class TestFiles:
    def test_save_and_load(self, tmp_path: Path) -> None:
        info = save(state(1), tmp_path / "a")
        assert info.nbytes == 4000
        with pytest.raises(aiostage.CheckpointExistsError):
            save(state(2), tmp_path / "a")
        with Stager() as stager:
            save(state(2), tmp_path / "a", stager=stager, overwrite=True)
            assert stager.statistics().stagings == 1
        live = state(0)
        assert load(tmp_path / "a", into=live) is live
        assert live["step"] == 2
        assert load(tmp_path / "a", only=["step"]) == {"step": 2}
