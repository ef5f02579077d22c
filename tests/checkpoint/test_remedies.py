"""What a checkpoint cannot carry is refused with advice, and what the advice says can be carried."""

from __future__ import annotations

import dataclasses
import enum
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import aiostage


@dataclasses.dataclass
class Record:
    weight: torch.Tensor


class Pair(NamedTuple):
    left: int
    right: int


class Color(enum.IntEnum):
    RED = 1


class Labelled(torch.Tensor):
    pass


def parts_of(tensor: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


CASES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "tensor subclass": (torch.ones(2).as_subclass(Labelled), "as_subclass(", lambda t: t.as_subclass(torch.Tensor)),
    "wrapper subclass": (TwoTensor(torch.ones(2), torch.zeros(2)), "__tensor_flatten__", parts_of),
    "generator": (torch.Generator(), "get_state()", lambda generator: generator.get_state()),
    "enum": (Color.RED, "its value", lambda color: color.value),
    "dataclass": (Record(torch.ones(2)), "vars()", vars),
    "storage": (
        torch.ones(2).untyped_storage(),
        "a tensor over it",
        lambda storage: torch.empty(0, dtype=torch.uint8).set_(storage),
    ),
    "named tuple": (Pair(1, 2), "tuple()", tuple),
    "text of NumPy": (np.str_("x"), "str()", str),
    "array of text": (np.array(["x"]), "tolist()", lambda array: array.tolist()),
    "other byte order": (np.array([1], dtype=">i4"), "byte order", lambda array: array.astype("i4")),
    "date": (np.datetime64("2020-01-01", "D"), "str()", str),
    "module": (torch.nn.Linear(2, 2), "state_dict()", lambda module: module.state_dict()),
    "anything else": (UserDict(a=1), "what it is made of", dict),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", CASES)
async def test_following_the_advice(kind: str, tmp_path: Path) -> None:
    value, advice, follow = CASES[kind]
    with pytest.raises(aiostage.UnsupportedLeafError) as caught:
        await aiostage.save({"odd": value}, tmp_path / "checkpoint")
    assert caught.value.remedy is not None
    assert advice in caught.value.remedy
    await aiostage.save({"odd": follow(value)}, tmp_path / "checkpoint")
