"""Checkpoints of Hugging Face's Trainer through aiostage: captured between two steps, written while it goes on."""

from __future__ import annotations

from typing import Any

import torch

from aiostage._extras import needed_for
from aiostage.blocking import Checkpointer

with needed_for("CheckpointCallback"):
    from transformers import TrainerCallback

__all__ = ["CheckpointCallback"]


class CheckpointCallback(TrainerCallback):
    """A callback for ``Trainer(callbacks=[...])`` that saves every few steps and at the end.

    Set ``save_strategy="no"`` in the ``TrainingArguments``, so that nothing is saved twice. Saved are the model, the
    optimizer, the scheduler, the step, and the generators of random numbers of the CPU. Training waits until that is
    captured. When the checkpointer is preempted, the callback saves and stops the training.

    Args:
        checkpoints: Entered around the training.
        every: How many steps lie between two checkpoints.

    Raises:
        ValueError: If ``every`` is below 1.
    """

    def __init__(self, checkpoints: Checkpointer, *, every: int) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, not {every!r}")
        self._checkpoints = checkpoints
        self._every = every
        self._saved = -1

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Save if it is time to, or if the process has to end."""
        preempted = self._checkpoints.preempted.is_set()
        if preempted or state.global_step % self._every == 0:
            self._save(state.global_step, objects)
        if preempted:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Save the end of the training."""
        self._save(state.global_step, objects)

    def restore(self, model: torch.nn.Module, optimizer: Any = None, lr_scheduler: Any = None) -> int:
        """Load the last checkpoint into live objects.

        Args:
            model: Takes the weights, in place.
            optimizer: Takes its state, if given.
            lr_scheduler: Takes its state, if given.

        Returns:
            The step that was saved; the data that was seen until then is for the caller to skip.

        Raises:
            CheckpointNotFoundError: If there is none.
        """
        saved = self._checkpoints.restore()
        model.load_state_dict(saved["model"])
        for name, target in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
            if target is not None:
                target.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        step: int = saved["step"]
        return step

    def _save(self, step: int, objects: dict[str, Any]) -> None:
        if step == self._saved:
            return
        parts = {name: objects[name] for name in ("optimizer", "lr_scheduler") if objects.get(name) is not None}
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"model": objects["model"].state_dict(), "step": step, "rng": torch.get_rng_state()}
        self._checkpoints.save(step, state)
        self._saved = step
