"""What messages show of the values that they are about: never a repr of a tree, never more than a line."""

from __future__ import annotations

import enum
import inspect
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aiostage
import aiostage.blocking
import aiostage.dcp
import aiostage.storage
from aiostage.errors import shown
from aiostage.leaf import format_path

LONGEST_MESSAGE = 1000


class Tripwire:
    """Counts how often its repr is asked for, which is long."""

    asked = 0

    def __repr__(self) -> str:
        Tripwire.asked += 1
        return "x" * 1_000_000


class Large(dict[str, Any]):
    def __len__(self) -> int:
        raise AssertionError("asked for its length")


class Colour(enum.Enum):
    RED = Tripwire()


def wrong_values() -> dict[str, Any]:
    """Return what no argument can be, each of a kind that is long to spell out."""
    return {
        "tree": {"model": {str(number): Tripwire() for number in range(1000)}},
        "subclass": Large(a=Tripwire()),
        "list": [Tripwire()] * 1000,
        "short list": [Tripwire()],
        "tuple": (Tripwire(), [Tripwire()], ((((Tripwire(),),),),)),
        "object": Tripwire(),
        "tensor": torch.zeros(100, 100),
        "array": np.zeros((100, 100)),
        "text": "\n" * 100_000,
        "bytes": b"x" * 100_000,
        "number": 10**5000,
        "negative": -(10**5000),
    }


WRONG = sorted(wrong_values())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (1.5, "1.5"),
        ("a", "'a'"),
        (b"a", "b'a'"),
        (torch.float16, "torch.float16"),
        (torch.device("cpu"), "device(type='cpu')"),
        (int, "the class int"),
        ((1, "a"), "(1, 'a')"),
        ((1,), "(1,)"),
        ({"a": 1}, "dict of 1"),
        (OrderedDict(a=1), "OrderedDict of 1"),
        ([1, 2], "list of 2"),
        ({1}, "set of 1"),
        (deque([1]), "deque of 1"),
        (bytearray(3), "bytearray of 3"),
        (torch.zeros(2, 3), "Tensor of shape (2, 3)"),
        (torch.nn.Parameter(torch.zeros(2)), "Parameter of shape (2,)"),
        (np.zeros((2, 3)), "ndarray of shape (2, 3)"),
        (Large(a=1), "Large of 1"),
        (Colour.RED, "Colour.RED"),
        (Path("a/b"), "PosixPath('a/b')"),
    ],
)
def test_shown(value: object, text: str) -> None:
    assert shown(value) == text


def test_number_without_a_text() -> None:
    assert shown(10**5000) == "a number of 16610 bits"


@pytest.mark.parametrize("name", WRONG)
def test_shown_is_short_and_asks_for_no_repr(name: str) -> None:
    Tripwire.asked = 0
    assert len(shown(wrong_values()[name])) <= 80
    assert len(format_path((wrong_values()[name],))) <= 100
    assert Tripwire.asked == 0


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "save": lambda wrong, at: aiostage.save({}, wrong),
    "save, swapped": lambda wrong, at: aiostage.save("checkpoint", wrong),
    "save, pair": lambda wrong, at: aiostage.save({}, (wrong, "name")),
    "save, name": lambda wrong, at: aiostage.save({}, (aiostage.storage.LocalStorage(at), wrong)),
    "save, stager": lambda wrong, at: aiostage.save({}, at / "c", stager=wrong),
    "save, progress": lambda wrong, at: aiostage.save({}, at / "c", progress=wrong),
    "save, overwrite": lambda wrong, at: aiostage.save({}, at / "c", overwrite=wrong),
    "save, shards": lambda wrong, at: aiostage.save({}, at / "c", max_shard_bytes=wrong),
    "load": lambda wrong, at: aiostage.load(wrong),
    "load, into": lambda wrong, at: aiostage.load(at / "saved", into=wrong),
    "load, only": lambda wrong, at: aiostage.load(at / "saved", only=wrong),
    "load, device": lambda wrong, at: aiostage.load(at / "saved", device=wrong),
    "load, answer of device": lambda wrong, at: aiostage.load(at / "saved", device=lambda path, like: wrong),
    "load, verify": lambda wrong, at: aiostage.load(at / "saved", verify=wrong),
    "load, in_place": lambda wrong, at: aiostage.load(at / "saved", into={}, in_place=wrong),
    "load, progress": lambda wrong, at: aiostage.load(at / "saved", progress=wrong),
    "load, backend": lambda wrong, at: aiostage.load(at / "saved", backend=wrong),
    "Checkpointer": lambda wrong, at: aiostage.Checkpointer(wrong),
    "Checkpointer, keep": lambda wrong, at: aiostage.Checkpointer(at, keep=wrong),
    "Checkpointer, keep_also": lambda wrong, at: aiostage.Checkpointer(at, keep=1, keep_also=wrong),
    "Checkpointer, max_in_flight": lambda wrong, at: aiostage.Checkpointer(at, max_in_flight=wrong),
    "Checkpointer, stager": lambda wrong, at: aiostage.Checkpointer(at, stager=wrong),
    "Checkpointer, signals": lambda wrong, at: aiostage.Checkpointer(at, save_on_signals=wrong),
    "Checkpointer, signal": lambda wrong, at: aiostage.Checkpointer(at, save_on_signals=[wrong]),
    "Checkpointer, incremental": lambda wrong, at: aiostage.Checkpointer(at, incremental=wrong),
    "Checkpointer.save": lambda wrong, at: aiostage.Checkpointer(at).save(wrong, 1),
    "Checkpointer.restore": lambda wrong, at: aiostage.Checkpointer(at).restore(step=wrong),
    "Checkpointer.delete": lambda wrong, at: aiostage.Checkpointer(at).delete(wrong),
    "AsyncStager": lambda wrong, at: aiostage.AsyncStager(wrong),
    "AsyncStager, backend": lambda wrong, at: aiostage.AsyncStager(backend=wrong),
    "AsyncStager.restore": lambda wrong, at: aiostage.AsyncStager().restore(wrong, {"a": torch.zeros(3)}),
    "adapt": lambda wrong, at: aiostage.adapt(wrong),
    "wait_event": lambda wrong, at: aiostage.wait_event(wrong),
    "LocalStorage": lambda wrong, at: aiostage.storage.LocalStorage(wrong),
    "blocking.Checkpointer": lambda wrong, at: aiostage.blocking.Checkpointer(at, keep=wrong),
    "blocking.save": lambda wrong, at: aiostage.blocking.Checkpointer(at).save(wrong, 1),
    "dcp.Checkpointer": lambda wrong, at: aiostage.dcp.Checkpointer(at, keep=wrong),
    "dcp.StorageWriter": lambda wrong, at: aiostage.dcp.StorageWriter(wrong),
    "StagingOptions.from_torch": lambda wrong, at: aiostage.StagingOptions.from_torch(wrong),
    **{
        f"StagingOptions, {name}": lambda wrong, at, name=name: aiostage.StagingOptions(**{name: wrong})  # type: ignore[misc]
        for name in inspect.signature(aiostage.StagingOptions).parameters
    },
}


@pytest.mark.asyncio
@pytest.mark.parametrize("call", CALLS)
async def test_wrong_arguments(call: str, tmp_path: Path) -> None:
    await aiostage.save({"a": torch.zeros(3)}, tmp_path / "saved")
    for name, wrong in wrong_values().items():
        Tripwire.asked = 0
        said = await message_of(lambda wrong=wrong: CALLS[call](wrong, tmp_path))  # type: ignore[misc]
        assert len(said) <= LONGEST_MESSAGE, f"{name}: {said[:300]}"
        assert Tripwire.asked == 0, name


async def message_of(call: Callable[[], Any]) -> str:
    """Return what the error of a call says, with its notes; nothing for the system's own about too long a path."""
    try:
        answer = call()
        if isinstance(answer, Awaitable):
            await answer
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            return ""
        return "".join((str(error), *getattr(error, "__notes__", ())))
    return ""
