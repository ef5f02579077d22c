"""Checkpoints of loops over Accelerate."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from aiostage import CheckpointMismatchError
from aiostage.blocking import Checkpointer
from aiostage.integrations.accelerate import AcceleratorCheckpoints
from tests.integrations.killed import Program, check_continued, running

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A training that can be run until it dies, and again."""
    with running("accelerating", tmp_path_factory.mktemp("runs")) as program:
        yield program


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_continued_with_the_same_losses(program: Program, tmp_path: Path, ranks: int) -> None:
    whole = program.losses(tmp_path / "whole", 14, 0, ranks=ranks)
    first = program.losses(tmp_path / "killed", 14, 8, ranks=ranks, dies=True)
    second = program.losses(tmp_path / "killed", 14, 0, ranks=ranks)
    assert len(whole) == 14
    check_continued(whole, first, second)


@pytest.mark.parametrize(
    "saved", [[1], {"models": 5}, {"models": [], "optimizers": [], "schedulers": [], "custom": []}]
)
def test_a_checkpoint_of_another_program_is_refused_by_name(tmp_path: Path, saved: object) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, saved).committed()
        checkpoints = AcceleratorCheckpoints(accelerate.Accelerator(cpu=True), checkpointer)
        with pytest.raises(CheckpointMismatchError, match="no AcceleratorCheckpoints has written it"):
            checkpoints.restore()


def test_other_objects_are_refused_before_anything_is_changed(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    with Checkpointer(tmp_path) as checkpointer:
        checkpoints = AcceleratorCheckpoints(accelerator, checkpointer)
        assert checkpoints.restore() is None
        assert not checkpoints.preempted
        checkpoints.save(1).committed()
        accelerator.prepare(torch.optim.SGD(model.parameters(), lr=1.0))
        with torch.no_grad():
            model.weight.zero_()
        with pytest.raises(CheckpointMismatchError, match=r"optimizers \(0 instead of 1\)"):
            checkpoints.restore()
        assert not model.weight.any()
    with pytest.raises(TypeError, match=r"must be an accelerate.Accelerator"):
        AcceleratorCheckpoints(model, checkpointer)
