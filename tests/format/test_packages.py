"""Objects of common packages, where the package is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage.checkpoint import PlainObject
from tests.checkpoint.uncopied import Uncopied


async def round_trip(value: Any, tmp_path: Path, **options: Any) -> Any:
    await aiostage.save({"value": value}, tmp_path / "checkpoint", overwrite=True)
    return (await aiostage.load(tmp_path / "checkpoint", **options))["value"]


@pytest.mark.asyncio
async def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    outputs = pytest.importorskip("transformers.modeling_outputs", reason="transformers is not installed")
    encoding = transformers.BatchEncoding({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, n_sequences=1)
    loaded = await round_trip([encoding, transformers.BatchFeature({"x": torch.ones(2)})], tmp_path)
    assert type(loaded[0]) is transformers.BatchEncoding
    assert loaded[0]["input_ids"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert type(loaded[1]) is transformers.BatchFeature
    assert loaded[1]["x"].tolist() == [1, 1]
    output = outputs.BaseModelOutput(last_hidden_state=torch.ones(2))
    made = await round_trip(output, tmp_path, classes=[outputs.BaseModelOutput])
    assert type(made) is outputs.BaseModelOutput
    assert made.last_hidden_state.tolist() == [1, 1]
    assert made.attentions is None
    plain = await round_trip(output, tmp_path)
    assert type(plain) is PlainObject
    again = await round_trip(plain, tmp_path, classes=[outputs.BaseModelOutput])
    assert type(again) is outputs.BaseModelOutput


@pytest.mark.asyncio
async def test_pydantic(tmp_path: Path) -> None:
    pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed")
    model = pydantic.create_model("Model", lr=(float, 0.1), path=(Path, Path("x")), names=(list[str], []))
    model.__module__ = __name__
    value = model(lr=0.5)
    loaded = await round_trip(value, tmp_path, classes=[model])
    assert type(loaded) is model
    assert loaded == value
    assert loaded.model_fields_set == {"lr"}


@pytest.mark.asyncio
async def test_tensordict(tmp_path: Path) -> None:
    tensordict = pytest.importorskip("tensordict", reason="tensordict is not installed")
    value = tensordict.TensorDict({"a": torch.ones(3, 2), "b": {"c": torch.zeros(3)}}, batch_size=[3], names=["time"])
    loaded = await round_trip(value, tmp_path)
    assert type(loaded) is tensordict.TensorDict
    assert loaded.batch_size == torch.Size([3])
    assert loaded.names == ["time"]
    assert loaded["b", "c"].tolist() == [0, 0, 0]
    # It stands for itself as a value of a dict, too, and not for its state_dict().
    live = {"x": tensordict.TensorDict({"a": torch.zeros(3, 2), "b": {"c": torch.ones(3)}}, [3], names=["time"])}
    tensor = live["x"]["a"]
    await aiostage.save({"x": value}, tmp_path / "value")
    assert type((await aiostage.load(tmp_path / "value"))["x"]) is tensordict.TensorDict
    await aiostage.load(tmp_path / "value", into=live)
    assert live["x"]["a"] is tensor
    assert tensor.sum() == 6
    # A copy of a locked one is not, as with copy.deepcopy, so this is written without one.
    await aiostage.save(value.lock_(), tmp_path / "locked", stager=Uncopied())
    assert (await aiostage.load(tmp_path / "locked")).is_locked


@pytest.mark.asyncio
async def test_omegaconf(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf", reason="omegaconf is not installed")
    value = omegaconf.OmegaConf.create({"a": {"b": "${a.c}", "c": 5}, "l": [1, "???"]})
    omegaconf.OmegaConf.set_struct(value, True)
    loaded = await round_trip(value, tmp_path)
    assert type(loaded) is omegaconf.DictConfig
    assert loaded == value
    assert loaded.a.b == 5
    assert omegaconf.OmegaConf.is_struct(loaded)
    assert omegaconf.OmegaConf.is_missing(loaded.l, 1)
    with pytest.raises(aiostage.UnsupportedLeafError, match="part of another config"):
        await round_trip(value.a, tmp_path)


@pytest.mark.asyncio
async def test_pyg(tmp_path: Path) -> None:
    data = pytest.importorskip("torch_geometric.data", reason="torch_geometric is not installed")
    value = data.Data(x=torch.ones(3, 2), edge_index=torch.tensor([[0, 1], [1, 2]]), name="graph")
    loaded = await round_trip(value, tmp_path)
    assert type(loaded) is data.Data
    assert loaded.edge_index.tolist() == [[0, 1], [1, 2]]
    assert loaded.name == "graph"


@pytest.mark.asyncio
async def test_torchao(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = torch.nn.Linear(64, 64)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    loaded = await round_trip(model.state_dict(), tmp_path)
    assert type(loaded["weight"]) is type(model.weight)
    assert torch.equal(loaded["weight"].dequantize(), model.weight.dequantize())


@pytest.mark.asyncio
async def test_bitsandbytes(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    loaded = await round_trip(layer.weight, tmp_path, classes=[bnb.nn.Params4bit])
    assert type(loaded) is bnb.nn.Params4bit
    assert torch.equal(loaded.data, layer.weight.data)
    assert torch.equal(loaded.quant_state.absmax, layer.weight.quant_state.absmax)
    assert (loaded.quant_type, loaded.blocksize) == ("nf4", layer.weight.blocksize)
