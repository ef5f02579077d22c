"""Checkpoints of Hugging Face's Trainer through aiostage: captured between two steps, written while it goes on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from aiostage._extras import needed_for
from aiostage.blocking import Checkpointer, SaveHandle
from aiostage.errors import CheckpointExistsError, CheckpointMismatchError, listed, shown
from aiostage.integrations._generators import Generators, missing_lists, state_of_generators
from aiostage.integrations._ranks import Ranks, refuse_partitioned, refuse_sharded

with needed_for("CheckpointCallback"):
    from transformers import TrainerCallback

__all__ = ["CheckpointCallback"]

_PARTS = ("optimizer", "lr_scheduler")


class CheckpointCallback(TrainerCallback):
    """A callback for ``Trainer(callbacks=[...])`` that saves every few steps and at the end.

    Set ``save_strategy="no"`` in the ``TrainingArguments``, so that nothing is saved twice. Saved are the model, the
    optimizer, the scheduler, the gradient scaler, the Trainer's own state, and every process's generators of random
    numbers. Training waits until that is captured. In a training of many processes every process has a callback and
    a checkpointer of the same target; the first writes. When the checkpointer of any process is preempted, the
    callback saves and stops the training on all.

    Models that are sharded over processes (FSDP, DeepSpeed ZeRO 3) are refused; save them with ``aiostage.dcp``. So are
    DeepSpeed's optimizers, of any stage.

    Args:
        checkpoints: Entered around the training.
        every: How many steps lie between two checkpoints.

    Raises:
        ValueError: If ``every`` is below 1.
    """

    def __init__(self, checkpoints: Checkpointer, *, every: int) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, not {shown(every)}")
        self._checkpoints = checkpoints
        self._every = every
        self._saved = -1
        self._last: SaveHandle | None = None
        self._ranks = Ranks()

    @contextmanager
    def resume(self, step: int | None = None) -> Iterator[str | None]:
        """Lay a checkpoint out as the Trainer reads it, for ``trainer.train(resume_from_checkpoint=...)``.

        The Trainer then restores everything by itself, and skips the data that was seen. Every process calls this.

        Args:
            step: The step of the checkpoint. None: the latest.

        Yields:
            A temporary folder, or None if there is no checkpoint and no step was asked for: ``train`` takes that for
            a new training. It is gone when the block is left.

        Raises:
            CheckpointNotFoundError: If there is no checkpoint of that step.
            CheckpointMismatchError: If it was not saved by a callback like this.
        """
        self._settle()
        if step is None:
            # One answer for all ranks: another checkpoint may be committed between two looks.
            step = self._ranks.from_first(self._checkpoints.latest())
        if step is None:
            yield None
            return
        saved = self._checkpoints.restore(step=step)
        _check_has(saved, {"model", "trainer_state"})
        with tempfile.TemporaryDirectory(prefix="aiostage-resume-") as name:
            _lay_out(saved, Path(name), step)
            # The Trainer reads the files. Without this, the memory of the checkpoint would be held during the training.
            del saved
            yield str(Path(name) / f"checkpoint-{step}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Refuse a training that would write over checkpoints of later steps.

        Raises:
            CheckpointExistsError: If there are checkpoints of later steps than the one from which the training starts.
        """
        self._settle()
        steps = self._ranks.from_first(self._checkpoints.steps())
        later = [step for step in steps if step > state.global_step]
        if later:
            raise CheckpointExistsError(
                f"the training starts at step {state.global_step}, and there are checkpoints of {_named(later)}.",
                remedy="Continue with `with callback.resume() as folder:` and "
                "`trainer.train(resume_from_checkpoint=folder)`, delete them, or save somewhere else.",
            )
        self._saved = state.global_step if state.global_step in steps else -1

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Save every few steps, and when a process has to end."""
        # A collective, so on all ranks and at every step: a signal need not reach all processes in the same step.
        preempted = self._ranks.any(self._checkpoints.preempted.is_set())
        if preempted or state.global_step % self._every == 0:
            self._save(args, state, objects)
        if preempted:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Save the end of the training."""
        self._save(args, state, objects)

    def restore(self, model: torch.nn.Module, optimizer: Any = None, lr_scheduler: Any = None) -> int:
        """Load the last checkpoint into live objects. To continue a training, use :meth:`resume`.

        Args:
            model: Takes the weights, in place.
            optimizer: Takes its state, if given.
            lr_scheduler: Takes its state, if given.

        Returns:
            The step that was saved.

        Raises:
            CheckpointNotFoundError: If there is none.
            CheckpointMismatchError: If it was not saved by a callback like this, or has no state of an object that is
                given; nothing was changed.
            CheckpointCorruptError: If it is damaged; nothing was changed.
        """
        self._settle()
        saved = self._checkpoints.restore()
        targets = {
            name: target for name, target in zip(_PARTS, (optimizer, lr_scheduler), strict=True) if target is not None
        }
        _check_has(saved, {"model", "step", *targets})
        generators = Generators(saved["generators"][0])
        model.load_state_dict(saved["model"])
        for name, target in targets.items():
            target.load_state_dict(saved[name])
        generators.set()
        step: int = saved["step"]
        return step

    def _save(self, args: Any, state: Any, objects: dict[str, Any]) -> None:
        step = state.global_step
        if step == self._saved:
            return
        model = objects["model"].state_dict()
        refuse_sharded(objects["model"], model, "model")
        refuse_partitioned(objects.get("optimizer"), "optimizer")
        several = not self._ranks.alone
        generators = self._ranks.gather(state_of_generators(all_devices=several))
        self._saved = step
        if not state.is_world_process_zero:
            return
        parts = {name: objects[name] for name in _PARTS if objects.get(name) is not None}
        saved = {name: part.state_dict() for name, part in parts.items()}
        scaler = getattr(objects.get("optimizer"), "scaler", None)
        if scaler is not None:
            saved["scaler"] = scaler.state_dict()
        saved |= {"model": model, "step": step, "generators": generators, "trainer_state": json.dumps(asdict(state))}
        self._last = self._checkpoints.save(step, saved)

    def _settle(self) -> None:
        """Wait for the last save of this callback, so that it counts as the latest checkpoint."""
        last, self._last = self._last, None
        if last is not None:
            last.committed()


def _check_has(saved: Any, names: set[str]) -> None:
    """Refuse a checkpoint that no callback has written, or that lacks what is to be loaded."""
    missing = {*missing_lists(saved, ["generators"]), *(names - saved.keys() if isinstance(saved, dict) else names)}
    if missing or not saved["generators"]:
        raise CheckpointMismatchError(
            missing=sorted(missing) or ["generators"],
            remedy="Load it with aiostage.load; no CheckpointCallback has written it.",
        )


def _lay_out(saved: dict[str, Any], root: Path, step: int) -> None:
    """Write the files that the Trainer looks for."""
    folder = root / f"checkpoint-{step}"
    folder.mkdir()
    torch.save(saved["model"], folder / "pytorch_model.bin")
    files = {"optimizer": "optimizer.pt", "lr_scheduler": "scheduler.pt", "scaler": "scaler.pt"}
    for name, file in files.items():
        if name in saved:
            torch.save(saved[name], folder / file)
    generators = saved["generators"]
    for rank, state in enumerate(generators):
        name = "rng_state.pth" if len(generators) == 1 else f"rng_state_{rank}.pth"
        (folder / name).write_bytes(Generators(state).file())
    (folder / "trainer_state.json").write_text(saved["trainer_state"])


def _named(steps: list[int]) -> str:
    return f"step{'s' * (len(steps) > 1)} {listed(list(map(str, steps)))}"
