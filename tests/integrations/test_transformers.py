from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

from packaging.version import Version

from aiostage import CheckpointExistsError, CheckpointMismatchError, CheckpointNotFoundError, UnsupportedLeafError
from aiostage.blocking import Checkpointer, load, save
from aiostage.integrations.transformers import CheckpointCallback
from tests.integrations.killed import Program, check_continued, running

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(8, 1)

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.mse_loss(self.net(x), labels)}


DATA = [{"x": torch.full((8,), number / 10.0), "labels": torch.tensor([float(number)])} for number in range(16)]


def train(model: Model, root: Path, callback: CheckpointCallback, steps: int):
    arguments = transformers.TrainingArguments(
        output_dir=str(root / "output"),
        max_steps=steps,
        per_device_train_batch_size=4,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=DATA, callbacks=[callback])
    trainer.train()
    return trainer


def test_saves_every_few_steps_and_at_the_end(tmp_path: Path) -> None:
    model = Model()
    with Checkpointer(tmp_path / "checkpoints", keep=2) as checkpoints:
        trainer = train(model, tmp_path, CheckpointCallback(checkpoints, every=3), 8)
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [6, 8]
        fresh = Model()
        with torch.no_grad():
            fresh.net.weight.zero_()
        # The Trainer makes an optimizer of two groups, with weight decay and without.
        optimizer = torch.optim.AdamW([{"params": [fresh.net.weight]}, {"params": [fresh.net.bias]}])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        assert CheckpointCallback(checkpoints, every=1).restore(fresh, optimizer, scheduler) == 8
    assert torch.equal(fresh.net.weight, model.net.weight)
    theirs = [moments["exp_avg"] for moments in trainer.optimizer.state.values()]
    ours = [moments["exp_avg"] for moments in optimizer.state.values()]
    assert all(map(torch.equal, ours, theirs))
    assert scheduler.last_epoch == 8


def test_stops_when_preempted(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.preempted.set()
        trainer = train(Model(), tmp_path, CheckpointCallback(checkpoints, every=100), 50)
        assert trainer.state.global_step == 1
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [1]


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointCallback(Checkpointer(tmp_path), every=0)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A training that can be run until it dies, and again."""
    with running("training", tmp_path_factory.mktemp("runs")) as program:
        yield program


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "ranks",
    [
        1,
        pytest.param(
            2,
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.18"),
                reason="Transformers before 5.18 cannot load an optimizer into several ranks on a CPU",
            ),
        ),
    ],
)
def test_killed_and_continued_with_the_same_losses(program: Program, tmp_path: Path, ranks: int) -> None:
    whole = program.losses(tmp_path / "whole", tmp_path / "output", 14, 0, ranks=ranks)
    first = program.losses(tmp_path / "killed", tmp_path / "output", 14, 8, ranks=ranks, dies=True)
    second = program.losses(tmp_path / "killed", tmp_path / "output", 14, 0, ranks=ranks)
    assert len(whole) == 14
    check_continued(whole, first, second)
    with Checkpointer(tmp_path / "killed") as checkpoints:
        assert checkpoints.steps() == [12, 14]


def test_a_training_that_would_save_over_later_steps_is_refused_at_its_start(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        callback = CheckpointCallback(checkpoints, every=2)
        train(Model(), tmp_path, callback, 4)
        callback.restore(Model())
        with pytest.raises(CheckpointExistsError, match=r"starts at step 0, .* of steps 2, 4.*callback.resume"):
            train(Model(), tmp_path, CheckpointCallback(checkpoints, every=2), 4)


def test_resume_from_a_step_and_from_nothing(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        callback = CheckpointCallback(checkpoints, every=2)
        with callback.resume() as folder:
            assert folder is None
        train(Model(), tmp_path, callback, 4)
        with callback.resume(2) as folder:
            assert Path(folder).name == "checkpoint-2"
            state = transformers.TrainerState.load_from_json(str(Path(folder) / "trainer_state.json"))
            assert state.global_step == 2
        assert not Path(folder).exists()
        with pytest.raises(CheckpointNotFoundError), callback.resume(3):
            pass
        checkpoints.save(9, {"model": {}}).committed()
        with pytest.raises(CheckpointMismatchError, match="trainer_state"), callback.resume():
            pass


@pytest.mark.parametrize("saved", [[1], {"model": {}}, {"model": {}, "generators": []}, {"model": {}, "generators": 5}])
def test_a_checkpoint_of_another_program_is_refused_by_name(tmp_path: Path, saved: object) -> None:
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(9, saved).committed()
        callback = CheckpointCallback(checkpoints, every=2)
        with pytest.raises(CheckpointMismatchError, match="no CheckpointCallback has written it"):
            callback.restore(Model())
        with pytest.raises(CheckpointMismatchError, match="no CheckpointCallback has written it"), callback.resume():
            pass


def test_a_missing_part_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        train(Model(), tmp_path, CheckpointCallback(checkpoints, every=2), 2)
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        saved = checkpoints.restore()
        del saved["optimizer"]
        checkpoints.save(3, saved).committed()
        fresh = Model()
        with torch.no_grad():
            fresh.net.weight.zero_()
        with pytest.raises(CheckpointMismatchError, match="optimizer"):
            CheckpointCallback(checkpoints, every=2).restore(fresh, torch.optim.AdamW(fresh.parameters()))
        assert not fresh.net.weight.any()


def test_the_end_is_not_saved_twice(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        callback = CheckpointCallback(checkpoints, every=2)
        train(Model(), tmp_path, callback, 4)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "output"), max_steps=4, use_cpu=True, save_strategy="no", report_to=[]
        )
        trainer = transformers.Trainer(Model(), arguments, train_dataset=DATA, callbacks=[callback])
        with callback.resume() as folder:
            trainer.train(resume_from_checkpoint=folder)
        assert checkpoints.steps() == [2, 4]


def test_arguments_are_put_into_a_state_dict_by_to_dict(tmp_path: Path) -> None:
    """They have the state of the process in them, which no file carries."""
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "output"), use_cpu=True, report_to=[])
    with pytest.raises(UnsupportedLeafError, match=r"distributed_state.*put their to_dict\(\) into the state dict"):
        save({"arguments": arguments}, tmp_path / "checkpoint")
    save({"arguments": arguments.to_dict()}, tmp_path / "checkpoint")
    assert load(tmp_path / "checkpoint") == {"arguments": arguments.to_dict()}
