from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from aiostage import StagedLeaf
from aiostage.leaf import Attribute, format_path


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), "state_dict"),
        (("model", "0.weight"), "state_dict['model']['0.weight']"),
        ((Attribute("tokenizer"), "table", 3), "state_dict.tokenizer['table'][3]"),
        (("a'b", 1.5, None, (1, 2)), """state_dict["a'b"][1.5][None][(1, 2)]"""),
        (("param_groups", 0, Attribute("lr")), "state_dict['param_groups'][0].lr"),
    ],
)
def test_a_path_is_written_as_the_access(path: tuple[object, ...], text: str) -> None:
    assert format_path(path) == text


def test_an_attribute_is_its_name() -> None:
    step = Attribute("grad")
    assert step == "grad"
    assert hash(step) == hash("grad")
    assert ("a", step) == ("a", "grad")
    twin = pickle.loads(pickle.dumps(step))
    assert type(twin) is Attribute
    assert twin == step


def test_a_leaf_is_frozen() -> None:
    tensor = torch.ones(1)
    leaf = StagedLeaf(("a",), tensor)
    assert (leaf.path, leaf.tensor) == (("a",), tensor)
    with pytest.raises(dataclasses.FrozenInstanceError):
        leaf.path = ()  # type: ignore[misc]
