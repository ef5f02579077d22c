"""Checkpoints of a loop over Hugging Face's Accelerate: captured between two steps, written while it goes on."""

from __future__ import annotations

from typing import Any

from aiostage import _private
from aiostage._extras import needed_for
from aiostage.blocking import Checkpointer, SaveHandle
from aiostage.errors import CheckpointMismatchError
from aiostage.integrations._generators import Generators, missing_lists, state_of_generators
from aiostage.integrations._ranks import Ranks, refuse_partitioned, refuse_sharded

with needed_for("AcceleratorCheckpoints"):
    from accelerate import Accelerator

__all__ = ["AcceleratorCheckpoints"]

_KINDS = ("models", "optimizers", "schedulers", "custom")


class AcceleratorCheckpoints:
    """Saves and restores a training with Accelerate, as ``save_state`` and ``load_state`` do, with a checkpointer.

    Saved is what the accelerator has prepared (models, optimizers, schedulers), what was registered with
    ``register_for_checkpointing``, the gradient scaler, and every process's generators of random numbers. In a
    training of many processes every process makes the same calls, with a checkpointer of the same target; the first
    writes. Models that are sharded over processes (FSDP, DeepSpeed ZeRO 3) are refused; save them with
    ``aiostage.dcp``. So are DeepSpeed's optimizers, of any stage.

    Args:
        accelerator: After its ``prepare``.
        checkpoints: Entered around the training.

    Raises:
        TypeError: If ``accelerator`` is none.
    """

    def __init__(self, accelerator: Accelerator, checkpoints: Checkpointer) -> None:
        if not isinstance(accelerator, Accelerator):
            raise TypeError(f"accelerator must be an accelerate.Accelerator, not {type(accelerator).__qualname__}")
        self._accelerator = accelerator
        self._checkpoints = checkpoints
        self._ranks = Ranks()

    @property
    def preempted(self) -> bool:
        """Whether any process has to end soon. All processes have to ask at the same step."""
        return self._ranks.any(self._checkpoints.preempted.is_set())

    def save(self, step: int) -> SaveHandle | None:
        """Capture a checkpoint, and leave the writing to the background.

        Args:
            step: The step, from 0. There must be no checkpoint of it yet.

        Returns:
            A handle on the rest, on the first process; None on the others.

        Raises:
            UnsupportedLeafError: If a model or an optimizer is sharded over processes, or something cannot be staged or
                carried.
            Exception: As :meth:`aiostage.blocking.Checkpointer.save` does.
        """
        # Of the unwrapped models: their names have no prefix of DistributedDataParallel.
        objects = self._objects()
        models = [model.state_dict() for model in objects["models"]]
        for number, (model, state) in enumerate(zip(objects["models"], models, strict=True)):
            refuse_sharded(model, state, f"models[{number}]")
        for number, optimizer in enumerate(objects["optimizers"]):
            refuse_partitioned(optimizer, f"optimizers[{number}]")
        # After the refusals, which are the same on all ranks: a rank that raises enters no collective.
        generators = self._ranks.gather(state_of_generators(all_devices=False))
        if not self._accelerator.is_main_process:
            return None
        saved: dict[str, Any] = {"models": models, "step": step, "generators": generators}
        for kind, items in objects.items():
            if kind != "models":
                saved[kind] = [item.state_dict() for item in items]
        if self._accelerator.scaler is not None:
            saved["scaler"] = self._accelerator.scaler.state_dict()
        return self._checkpoints.save(step, saved)

    def restore(self, step: int | None = None) -> int | None:
        """Load a checkpoint into what the accelerator has prepared.

        Args:
            step: The step. None: the latest.

        Returns:
            The step that was saved; None if there is no checkpoint and no step was asked for. The data that was seen
            until then is for ``accelerator.skip_first_batches``.

        Raises:
            CheckpointNotFoundError: If there is no checkpoint of that step.
            CheckpointMismatchError: If other numbers of objects were prepared when it was saved, or another program
                has saved it; nothing was changed.
            CheckpointCorruptError: If it is damaged; nothing was changed.
        """
        if step is None:
            # One answer for all ranks: another checkpoint may be committed between two looks.
            step = self._ranks.from_first(self._checkpoints.latest())
        if step is None:
            return None
        saved = self._checkpoints.restore(step=step)
        missing = missing_lists(saved, (*_KINDS, "generators"))
        if missing:
            raise CheckpointMismatchError(
                missing=missing, remedy="Load it with aiostage.load; no AcceleratorCheckpoints has written it."
            )
        objects = self._objects()
        differing = [
            f"{kind} ({len(saved[kind])} instead of {len(objects[kind])})"
            for kind in _KINDS
            if len(saved[kind]) != len(objects[kind])
        ]
        if differing:
            raise CheckpointMismatchError(
                mismatched=differing, remedy="Prepare and register what was prepared and registered when it was saved."
            )
        generators, rank = saved["generators"], self._accelerator.process_index
        # Checked before the first object is changed. A training that goes on with more processes has none for some.
        own = Generators(generators[rank]) if rank < len(generators) else None
        for kind in _KINDS:
            for target, state in zip(objects[kind], saved[kind], strict=True):
                target.load_state_dict(state)
        if self._accelerator.scaler is not None and "scaler" in saved:
            self._accelerator.scaler.load_state_dict(saved["scaler"])
        if own is not None:
            own.set()
        return step

    def _objects(self) -> dict[str, list[Any]]:
        prepared = {kind: list(_private.prepared_by(self._accelerator, kind)) for kind in _KINDS}
        return prepared | {"models": [self._accelerator.unwrap_model(model) for model in prepared["models"]]}
