"""The states of a process's random number generators, as plain values and tensors: reading them runs no code."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from aiostage.errors import CheckpointCorruptError, said
from aiostage.format.numpy_kinds import bit_generator

__all__ = ["Generators", "missing_lists", "state_of_generators"]


def state_of_generators(*, all_devices: bool) -> dict[str, Any]:
    """Return the state of all random number generators, for a checkpoint.

    Args:
        all_devices: Whether to include all CUDA devices, and not the current one only.
    """
    version, words, gauss = random.getstate()
    state = {
        # 625 numbers: as a tensor they are one entry of the checkpoint, and not 625.
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64, device="cpu"), "gauss": gauss},
        "numpy": np.random.get_state(legacy=False),
        "cpu": torch.get_rng_state(),
    }
    device: Any = torch.get_device_module("cuda")
    if device.is_available():
        state["cuda"] = device.get_rng_state_all() if all_devices else device.get_rng_state()
    return state


def missing_lists(saved: Any, names: Iterable[str]) -> list[str]:
    """Return which lists a checkpoint that another program may have written does not have."""
    entries = saved if isinstance(saved, Mapping) else {}
    return [name for name in names if not isinstance(entries.get(name), list)]


class Generators:
    """A result of :func:`state_of_generators` from a checkpoint. It is checked before anything is set.

    Raises:
        CheckpointCorruptError: If it is not one.
    """

    def __init__(self, saved: Any) -> None:
        try:
            python, cuda = saved["python"], saved.get("cuda")
            self._python = (python["version"], tuple(python["words"].tolist()), python["gauss"])
            self._numpy, self._cpu, self._cuda = saved["numpy"], saved["cpu"], cuda
            # Each state is first set on a generator that is made for this: set() then changes all or none.
            random.Random().setstate(self._python)
            if not isinstance(self._python[2], (float, type(None))):
                raise ValueError(f"the next Gaussian number is a {type(self._python[2]).__name__}")
            # NumPy accepts a position outside of the state, and reads memory there. bit_generator() checks it.
            bits = {key: value for key, value in self._numpy.items() if "gauss" not in key}
            np.random.RandomState(bit_generator(bits["bit_generator"], bits)).set_state(self._numpy)
            torch.Generator(device="cpu").set_state(self._cpu)
            for state in cuda if isinstance(cuda, list) else [cuda] * (cuda is not None):
                if not isinstance(state, torch.Tensor) or state.dtype is not torch.uint8:
                    raise TypeError(f"the state of a CUDA device is a {type(state).__name__}")
        except Exception as error:
            kind = "" if isinstance(saved, Mapping) else f" but a {type(saved).__name__}"
            raise CheckpointCorruptError(
                f"it is not a state of the generators of random numbers{kind}: {said(error)}.", path="generators"
            ) from error

    def set(self) -> None:
        """Set the generators of this process. CUDA's are left alone where there is none."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        device: Any = torch.get_device_module("cuda")
        if self._cuda is not None and device.is_available():
            (device.set_rng_state_all if isinstance(self._cuda, list) else device.set_rng_state)(self._cuda)

    def file(self) -> bytes:
        """Return the contents of the Trainer's ``rng_state.pth``."""
        state = {"python": self._python, "numpy": self._numpy, "cpu": self._cpu}
        if self._cuda is not None:
            state["cuda"] = self._cuda
        stream = io.BytesIO()
        torch.save(state, stream)
        return stream.getvalue()
