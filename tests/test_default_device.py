"""An active default device changes nothing: host tensors that aiostage makes say that they are on the host."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

import aiostage
from aiostage import dcp
from tests.parsing import parse

ROOT = Path(aiostage.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# What makes tensors on the default device: torch's own list, and generators.
FACTORIES = {function.__name__ for function in _device_constructors() if hasattr(torch, function.__name__)} | {
    "Generator"
}
# These take memory as it is, which the test below shows.
FACTORIES -= {"frombuffer"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_factory_says_where(path: Path) -> None:
    silent = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
        and not any(keyword.arg in ("device", None) for keyword in node.keywords)
    ]
    assert not silent, "pass device=, or an active default device decides"


def test_the_list_is_torchs() -> None:
    assert {"empty", "tensor", "as_tensor", "empty_strided", "sparse_coo_tensor"} <= FACTORIES
    with torch.device("meta"):
        assert torch.frombuffer(bytearray(8), dtype=torch.uint8).device.type == "cpu"
        assert torch.from_numpy(np.ones(2)).device.type == "cpu"


@contextmanager
def set_default_device() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(before if before.type != "cpu" else None)


WAYS = {"context": lambda: torch.device("meta"), "set_default_device": set_default_device}


@pytest.fixture(params=list(WAYS))
def default_device(request: pytest.FixtureRequest) -> Any:
    return WAYS[request.param]


def tree() -> dict[str, Any]:
    base = torch.arange(12.0)
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8)
    generator = torch.Generator()
    generator.manual_seed(7)
    return {
        "plain": {f"p{n}": torch.full((3,), float(n)) for n in range(5)},
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "base": base,
        "view": base[2:6],
        "strided": torch.arange(6.0).reshape(2, 3).t(),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "compressed": torch.eye(3).to_sparse_csr(),
        "quantized": quantized,
        "array": np.arange(4),
        "large": torch.ones(3_000_000),
    }


def check(made: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(made) == list(expected)
        for key in expected:
            check(made[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert made.device.type == "cpu"
        if expected.layout is not torch.strided:
            made, expected = made.to_dense(), expected.to_dense()
        assert torch.equal(made, expected)
    else:
        assert np.array_equal(made, expected)


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning"),
]


@pytest.mark.asyncio
async def test_stage_restore_and_cast(default_device: Any) -> None:
    source = tree()
    async with (
        aiostage.AsyncStager() as stager,
        aiostage.AsyncStager(aiostage.StagingOptions(dtype=torch.float64)) as cast,
    ):
        with default_device():
            staged = await stager.stage(source)
            check(staged, source)
            wide = await cast.stage(source)
            live = {"a": torch.zeros(3, device="cpu")}
            await stager.restore({"a": torch.ones(3, device="cpu")}, into=live)
    assert wide["view"].dtype is torch.float64
    assert wide["view"].tolist() == source["view"].tolist()
    assert live["a"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.asyncio
async def test_share(default_device: Any) -> None:
    source = {"a": torch.arange(4.0), "b": torch.ones(2, 3)}
    async with aiostage.AsyncStager(aiostage.StagingOptions(use_shared_memory=True)) as stager:
        with default_device():
            staged = await stager.stage(source)
            check((await stager.share(staged)).open(), source)


@pytest.mark.asyncio
async def test_save_and_load(default_device: Any, tmp_path: Path) -> None:
    source = tree()
    into = {"plain": {f"p{n}": torch.zeros(3) for n in range(5)}, "strided": torch.zeros(2, 3).t()}
    with default_device():
        await aiostage.save(source, tmp_path / "all")
        check(await aiostage.load(tmp_path / "all"), source)
        await aiostage.save({key: source[key] for key in into}, tmp_path / "some")
        await aiostage.load(tmp_path / "some", into=into)
        async with aiostage.AsyncStager(aiostage.StagingOptions(max_host_bytes=16 << 20)) as stager:
            await aiostage.save(source, tmp_path / "streamed", stager=stager)
        check(await aiostage.load(tmp_path / "streamed"), source)
    check(into, {key: source[key] for key in into})


@pytest.mark.asyncio
async def test_dcp(default_device: Any, tmp_path: Path) -> None:
    source = {"a": torch.arange(4.0), "b": {"c": torch.ones(2, 3, dtype=torch.bfloat16)}, "step": 3}
    into = {"a": torch.zeros(4), "b": {"c": torch.zeros(2, 3, dtype=torch.bfloat16)}, "step": 0}
    with default_device():
        await dcp.save(source, checkpoint_id="a", storage_writer=dcp.StorageWriter(tmp_path))
        await dcp.load(into, checkpoint_id="a", storage_reader=dcp.StorageReader(tmp_path))
    assert into == {"a": into["a"], "b": into["b"], "step": 3}
    check(into["a"], source["a"])
    check(into["b"], source["b"])
