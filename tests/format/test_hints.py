"""What a checkpoint cannot carry is refused with advice, and what the advice says is followed here to its end."""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections import UserDict, UserList, defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aiostage
from aiostage.checkpoint import register
from aiostage.format import registry
from tests.checkpoint.uncopied import Uncopied


class Mine(dict[str, int]):
    pass


class Text(str):
    __slots__ = ()


class Whole(int):
    pass


class Settings(UserDict[str, int]):
    pass


class Point:
    __slots__ = ("x",)

    def __init__(self, x: int) -> None:
        self.x = x


class Listing(list[int]):
    pass


def registering(cls: type, *functions: Any) -> Callable[[Any], Any]:
    """Follow the advice to register a class."""

    def follow(value: Any) -> Any:
        register(cls, *functions)
        return value

    return follow


def titled() -> np.ndarray[Any, Any]:
    return np.zeros(2, np.dtype({"names": ["a"], "formats": ["f4"], "titles": ["title"]}))


def matrix() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.asmatrix([[1.5, 2]])


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards what a test has registered."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


# The object, a piece of the advice, and how it is followed.
CASES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "module": (torch.nn.Linear(2, 2), "Put its state_dict()", lambda module: module.state_dict()),
    "class": (Point, "Put its name", lambda cls: cls.__name__),
    "function": (math.sqrt, "Put its name", lambda function: function.__name__),
    "partial": (functools.partial(max, 1), "Put its name", lambda partial: partial.func.__name__),
    "matrix": (matrix(), "np.asarray(", np.asarray),
    "record array": (np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), "np.asarray(", np.asarray),
    "array of objects": (np.array([None, {}], dtype=object), "its tolist()", lambda array: array.tolist()),
    "long floats": (np.ones(2, np.longdouble), "its view(np.uint8)", lambda array: array.view(np.uint8)),
    "long floats, shorter": (np.ones(2, np.longdouble), "astype(np.float64)", lambda array: array.astype(np.float64)),
    "long float": (np.longdouble(1) / 3, ".view(np.uint8)", lambda value: np.array([value]).view(np.uint8)),
    "titles": (titled(), "without titles", lambda array: array.astype([("a", "f4")])),
    "factory": (defaultdict(lambda: 1, a=2), "Convert it to a dict", dict),
    "subclass of str": (Text("x"), "by str()", str),
    "subclass of int": (
        Whole(3),
        "register its class",
        registering(Whole, lambda value: ([int(value)], None), lambda values, _: Whole(values[0])),
    ),
    "subclass of dict": (Mine(a=1), "convert it by dict()", dict),
    "subclass of list": (
        Listing([1]),
        "Register its class",
        registering(Listing, lambda values: (list(values), None), lambda values, _: Listing(values)),
    ),
    "user dict": (Settings(a=1), "Register its class", registering(Settings)),
    "user list": (UserList([1]), "put what it is made of", list),
    "slots": (Point(1), "Register its class", registering(Point)),
    "closed buffer": (io.BytesIO(), "getvalue()", lambda buffer: b""),
    "large fraction": (Fraction(1, 1 << 70_000), "numerator", lambda value: [value.numerator, value.denominator]),
}
CASES["closed buffer"][0].close()
if hasattr(np.dtypes, "StringDType"):
    # Since NumPy 2.0.
    strings = np.array(["a"], np.dtypes.StringDType())
    CASES["array of strings"] = (strings, "tolist()", lambda array: array.tolist())


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", CASES)
async def test_following_the_advice(kind: str, tmp_path: Path) -> None:
    value, advice, follow = CASES[kind]
    with pytest.raises(aiostage.UnsupportedLeafError) as caught:
        # In a list, since a save asks a module that is a value of the dict itself for its state.
        await aiostage.save({"odd": [value]}, tmp_path / "checkpoint", stager=Uncopied())
    assert caught.value.remedy is not None
    assert advice in caught.value.remedy
    assert caught.value.path == "state_dict['odd'][0]"
    followed = {"odd": [follow(value)]}
    await aiostage.save(followed, tmp_path / "checkpoint")
    loaded = await aiostage.load(tmp_path / "checkpoint")
    assert type(loaded["odd"][0]) is type(followed["odd"][0])
    if kind == "large fraction":
        assert loaded == followed
    elif not isinstance(value, (Point, torch.nn.Module)):
        assert repr(loaded) == repr(followed)
