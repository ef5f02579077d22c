"""What comes back as itself: the kinds of the standard library, NumPy and PyTorch."""

from __future__ import annotations

import copy
import datetime as dt
import io
import pathlib
import random
import uuid
from argparse import Namespace
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch

import aiostage


def record_array() -> np.ndarray[Any, Any]:
    dtype = np.dtype([("id", ">i4"), ("name", "U5"), ("at", "M8[s]"), ("pair", "f4", (2,))], align=True)
    return np.array([(1, "a", "2020-01-02", (1.5, 2)), (2, "ü", "NaT", (0, -1))], dtype)


def masked() -> Any:
    return np.ma.MaskedArray([[1.5, 2], [3, 4]], mask=[[True, False], [False, True]], fill_value=-1, hard_mask=True)


def generator(seed: int = 3) -> torch.Generator:
    made = torch.Generator()
    made.manual_seed(seed)
    torch.rand(5, generator=made)
    return made


def buffer() -> io.BytesIO:
    made = io.BytesIO(b"some bytes")
    made.seek(4)
    return made


EQUAL: dict[str, Callable[[], Any]] = {
    "path": lambda: Path("runs/α"),
    "odd path": lambda: Path("runs/\udcff"),
    "pure path": lambda: pathlib.PurePosixPath("/a/b"),
    "windows path": lambda: pathlib.PureWindowsPath(r"C:\a\b"),
    "datetime": lambda: dt.datetime(2020, 2, 29, 1, 2, 3, 4),
    "second of two hours": lambda: dt.datetime(2020, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
    "datetime of a zone": lambda: dt.datetime(2020, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=-3, minutes=30))),
    "date": lambda: dt.date(1, 1, 1),
    "time": lambda: dt.time(23, 59, 59, 999999, tzinfo=dt.UTC, fold=1),
    "timedelta": lambda: dt.timedelta(days=-3, microseconds=7),
    "timezone": lambda: dt.timezone(dt.timedelta(hours=1), "name"),
    "utc": lambda: dt.UTC,
    "uuid": lambda: uuid.UUID(int=1 << 127),
    "decimal": lambda: Decimal("-0.000000000000000000000000000000000001E+50"),
    "infinite decimal": lambda: Decimal("-Infinity"),
    "fraction": lambda: Fraction(-(10**400), 7),
    "range": lambda: range(3, 10**30, 7),
    "slice": lambda: slice(None, "x", 2),
    "namespace": lambda: Namespace(lr=0.1, names=["a"], **{"not a name": 1}),
    "simple namespace": lambda: SimpleNamespace(a=1, b=SimpleNamespace(c={})),
    "text of numpy": lambda: np.str_("ü"),
    "empty text of numpy": lambda: np.str_(""),
    "bytes of numpy": lambda: np.bytes_(b"ab"),
    "datetime64": lambda: np.datetime64("2020-01-01T00:00:01", "25s"),
    "timedelta64": lambda: np.timedelta64(-5, "D"),
    "dtype": lambda: record_array().dtype,
    "simple dtype": lambda: np.dtype(">f4"),
    "qscheme": lambda: torch.per_channel_affine,
}

ARRAYS: dict[str, Callable[[], Any]] = {
    "text": lambda: np.array([["a", "ü"], ["", "abc"]]),
    "bytes": lambda: np.array([b"a", b"abc"]),
    "empty text": lambda: np.array([""]),
    "dates": lambda: np.array(["2020-01-01", "NaT"], "M8[D]"),
    "records": record_array,
    "one record": lambda: record_array()[0],
    "other byte order": lambda: np.arange(5, dtype=">i8")[::-2],
    "columns first": lambda: np.asfortranarray(np.array([["a", "b", "c"], ["d", "e", "f"]])),
    "records with attributes": lambda: np.asarray(np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])),
    "no elements": lambda: np.empty((3, 0, 2), "U7"),
    "no dimensions": lambda: np.array("2020", "M8[Y]"),
}


async def round_trip(value: Any, tmp_path: Path) -> Any:
    """Return what comes back of a value from a stager's copy; what is written without one has to be the same."""
    await aiostage.save({"value": value, "same": [value]}, tmp_path / "plain")
    await aiostage.save({"value": value, "same": [value]}, tmp_path / "staged")
    plain, staged = await aiostage.load(tmp_path / "plain"), await aiostage.load(tmp_path / "staged")
    assert type(plain["value"]) is type(staged["value"])
    for loaded in (plain, staged):
        assert loaded["same"][0] is loaded["value"]
    return staged["value"]


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", EQUAL)
async def test_comes_back_equal(kind: str, tmp_path: Path) -> None:
    value = EQUAL[kind]()
    loaded = await round_trip(value, tmp_path)
    assert type(loaded) is type(value)
    assert loaded == value
    assert repr(loaded) == repr(value)
    assert getattr(loaded, "fold", 0) == getattr(value, "fold", 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ARRAYS)
async def test_arrays_come_back(kind: str, tmp_path: Path) -> None:
    value = ARRAYS[kind]()
    loaded = await round_trip(value, tmp_path)
    assert type(loaded) is type(value)
    assert loaded.dtype == value.dtype
    assert loaded.shape == value.shape
    assert loaded.tobytes() == value.tobytes()
    assert loaded.dtype.isalignedstruct == value.dtype.isalignedstruct
    if isinstance(value, np.ndarray):
        assert loaded.flags.f_contiguous == value.flags.f_contiguous or value.ndim < 2
        assert loaded.flags.writeable
        assert loaded.flags.aligned


@pytest.mark.asyncio
@pytest.mark.parametrize("mask", [True, False])
async def test_masked_arrays_come_back(mask: bool, tmp_path: Path) -> None:
    value = masked() if mask else np.ma.MaskedArray([1, 2])
    loaded = await round_trip(value, tmp_path)
    assert type(loaded) is np.ma.MaskedArray
    assert loaded.data.tobytes() == value.data.tobytes()
    assert np.array_equal(np.ma.getmaskarray(loaded), np.ma.getmaskarray(value))
    assert (np.ma.getmask(loaded) is np.ma.nomask) is not mask
    assert loaded.fill_value == value.fill_value
    assert loaded.hardmask == value.hardmask


@pytest.mark.asyncio
async def test_mapped_arrays_come_back_as_arrays(tmp_path: Path) -> None:
    numbers = np.memmap(tmp_path / "numbers", dtype="f4", mode="w+", shape=(5,))
    numbers[:] = range(5)
    texts = np.memmap(tmp_path / "texts", dtype="U2", mode="w+", shape=(2,))
    texts[:] = ["a", "bc"]
    loaded = await round_trip([numbers, texts], tmp_path)
    assert [type(array) for array in loaded] == [np.ndarray, np.ndarray]
    assert loaded[0].tolist() == [0, 1, 2, 3, 4]
    assert loaded[1].tolist() == ["a", "bc"]


@pytest.mark.asyncio
async def test_buffers_come_back(tmp_path: Path) -> None:
    loaded = await round_trip(buffer(), tmp_path)
    assert type(loaded) is io.BytesIO
    assert loaded.tell() == 4
    assert loaded.read() == b" bytes"
    assert (await round_trip([io.BytesIO()], tmp_path / "empty"))[0].getvalue() == b""


@pytest.mark.asyncio
async def test_random_states_go_on_where_they_were(tmp_path: Path) -> None:
    made = random.Random(5)
    made.gauss(0, 1)
    loaded = await round_trip(made, tmp_path)
    assert [loaded.gauss(0, 1) for _ in range(3)] == [made.gauss(0, 1) for _ in range(3)]
    assert loaded.random() == made.random()


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"])
async def test_generators_of_numpy_go_on_where_they_were(name: str, tmp_path: Path) -> None:
    bits = getattr(np.random, name)(7)
    made = np.random.Generator(bits)
    made.random(5, dtype=np.float32)
    old = np.random.RandomState(getattr(np.random, name)(8))
    old.standard_normal(3)
    tree = {"new": made, "old": old, "bits": bits}
    loaded = await round_trip(tree, tmp_path)
    # A Generator of NumPy 1 is copied with another generator of bits.
    twin = copy.deepcopy(tree)
    assert (loaded["new"].bit_generator is loaded["bits"]) is (twin["new"].bit_generator is twin["bits"])
    assert np.__version__ < "2" or loaded["new"].bit_generator is loaded["bits"]
    assert loaded["new"].random(9, dtype=np.float32).tolist() == made.random(9, dtype=np.float32).tolist()
    assert loaded["old"].standard_normal(9).tolist() == old.standard_normal(9).tolist()
    assert loaded["old"].randint(100, size=9).tolist() == old.randint(100, size=9).tolist()


@pytest.mark.asyncio
async def test_generators_of_torch_go_on_where_they_were(tmp_path: Path) -> None:
    made = generator()
    loaded = await round_trip(made, tmp_path)
    assert loaded.initial_seed() == 3
    assert torch.equal(torch.randn(99, generator=loaded), torch.randn(99, generator=made))


@pytest.mark.asyncio
async def test_what_operators_return_comes_back(tmp_path: Path) -> None:
    value = torch.max(torch.tensor([[1.0, 3.0], [5.0, 4.0]]), 1)
    loaded = await round_trip(value, tmp_path)
    assert type(loaded) is torch.return_types.max
    assert loaded.values.tolist() == [3, 5]
    assert loaded.indices.tolist() == [1, 0]


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
async def test_storages_come_back(tmp_path: Path) -> None:
    tensor = torch.arange(5.0)
    loaded = await round_trip([tensor, tensor.untyped_storage(), tensor[1:], tensor.storage()], tmp_path)
    assert type(loaded[1]) is torch.UntypedStorage
    assert type(loaded[3]) is torch.TypedStorage
    assert loaded[3].dtype is torch.float32
    assert list(loaded[3]) == [0, 1, 2, 3, 4]
    # A stager copies storages apart from tensors.
    await aiostage.save([tensor, tensor.untyped_storage(), tensor[1:], tensor.storage()], tmp_path / "tied")
    loaded = await aiostage.load(tmp_path / "tied")
    assert loaded[1].data_ptr() == loaded[3].data_ptr() == loaded[0].data_ptr() == loaded[2].data_ptr() - 4


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
async def test_jagged_tensors_come_back(tmp_path: Path) -> None:
    value = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    loaded = await round_trip(value, tmp_path)
    assert type(loaded) is type(value)
    assert [part.tolist() for part in loaded.unbind()] == [part.tolist() for part in value.unbind()]


@pytest.mark.asyncio
async def test_namespaces_in_circles(tmp_path: Path) -> None:
    made = SimpleNamespace(name="a")
    made.around = (made, [made])
    loaded = await round_trip(made, tmp_path)
    assert loaded.around[0] is loaded
    assert loaded.around[1][0] is loaded


@pytest.mark.asyncio
async def test_as_keys_and_in_sets(tmp_path: Path) -> None:
    value = {Path("a"): {Decimal(1), Fraction(1, 3)}, dt.date(2020, 1, 1): frozenset([range(3)])}
    assert await round_trip(value, tmp_path) == value
