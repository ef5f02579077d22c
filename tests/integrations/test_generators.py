"""The generators of random numbers in checkpoints of others, which may be hostile."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aiostage import CheckpointCorruptError
from aiostage.blocking import load, save
from aiostage.integrations._generators import Generators, state_of_generators


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return exec, (f"__import__('os').mkdir({self.path!r})",)


def numbers() -> list[Any]:
    return [random.gauss(0, 1), *np.random.standard_normal(3).tolist(), *torch.rand(3).tolist()]


def test_they_continue_from_a_checkpoint(tmp_path: Path) -> None:
    numbers()
    save([state_of_generators(all_devices=True)], tmp_path / "saved")
    known = numbers()
    numbers()
    generators = Generators(load(tmp_path / "saved")[0])
    generators.set()
    assert numbers() == known
    # NumPy 1 and 2 have it in different modules.
    reconstruct = np.zeros(1).__reduce__()[0]
    with torch.serialization.safe_globals([reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType]):
        file = torch.load(io.BytesIO(generators.file()), weights_only=True)
    random.setstate(file["python"])
    np.random.set_state(file["numpy"])
    torch.set_rng_state(file["cpu"])
    assert numbers() == known


def test_code_of_a_hostile_checkpoint_does_not_run(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(Hostile(tmp_path / "ran"), stream)
    save([torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)], tmp_path / "saved")
    with pytest.raises(CheckpointCorruptError, match="generators"):
        Generators(load(tmp_path / "saved")[0])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"python": None},
        {"python": {"version": 3, "words": torch.zeros(3, dtype=torch.int64), "gauss": None}},
        {"python": {"version": 3, "words": torch.full((625,), 700), "gauss": None}},
        {"numpy": {"bit_generator": "MT19937", "state": {"key": np.zeros(624, np.uint32), "pos": 10**6}}},
        {"numpy": {"bit_generator": "os.system", "state": {}}},
        {"cpu": torch.zeros(8, dtype=torch.uint8)},
        {"cuda": ["x"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_states_are_refused_before_any_is_set(change: dict[str, Any]) -> None:
    saved = state_of_generators(all_devices=False)
    before = repr(random.getstate()), torch.get_rng_state()
    numpy_before = np.random.get_state(legacy=False)
    with pytest.raises(CheckpointCorruptError, match="not a state of the generators"):
        Generators(saved | change)
    assert repr(random.getstate()) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], numpy_before["state"]["key"])
