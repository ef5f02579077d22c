"""Checkpoints of other programs: read where that needs no code, and named where it does."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

import aiostage
from aiostage.checkpoint import convert
from aiostage_command import main
from tests.checkpoint.comparing import assert_same


def tree() -> dict[str, Any]:
    weight = torch.arange(6.0).view(2, 3)
    return {"model": OrderedDict(weight=weight, tied=weight, bias=torch.ones(3)), "step": 7, "names": ["a", ("b", 1.5)]}


def flat() -> dict[str, torch.Tensor]:
    # In the order of the files.
    return {"a.weight": torch.arange(6.0).view(2, 3), "empty": torch.empty(0, 2), "a.half": torch.ones(5).bfloat16()}


def save_torch(path: Path) -> Path:
    torch.save(tree(), path / "file.pt")
    return path / "file.pt"


def save_legacy(path: Path) -> Path:
    torch.save(tree(), path / "file.ckpt", _use_new_zipfile_serialization=False)
    return path / "file.ckpt"


def save_single(path: Path) -> Path:
    save_file(flat(), path / "anything.safetensors", metadata={"format": "pt"})
    return path / "anything.safetensors"


def save_hub(path: Path) -> Path:
    """As hubs have it: shards, an index and other files."""
    found = flat()
    (path / "config.json").write_text("{}")
    save_file({"a.weight": found.pop("a.weight")}, path / "model-00001-of-00002.safetensors")
    save_file(found, path / "model-00002-of-00002.safetensors")
    where = dict.fromkeys(found, "model-00002-of-00002.safetensors") | {"a.weight": "model-00001-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def save_hub_torch(path: Path) -> Path:
    torch.save(flat(), path / "pytorch_model.bin")
    return path


FORMATS: dict[str, tuple[Callable[[Path], Path], Callable[[], Any]]] = {
    "torch.save": (save_torch, tree),
    "torch.save of old": (save_legacy, tree),
    "safetensors": (save_single, flat),
    "a hub": (save_hub, flat),
    "its index": (lambda path: save_hub(path) / "model.safetensors.index.json", flat),
    "a hub of old": (save_hub_torch, flat),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", FORMATS)
async def test_formats(name: str, tmp_path: Path) -> None:
    write, expected = FORMATS[name]
    path = write(tmp_path)
    assert_same(expected(), await aiostage.load(path))
    assert_same(expected(), await aiostage.load(path, verify=False))
    info = await convert(path, tmp_path / "converted")
    assert_same(expected(), await aiostage.load(info.path))


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
async def test_distributed_checkpoints(tmp_path: Path) -> None:
    saved = {"model": {"w": torch.arange(6.0).view(2, 3), "n": 5}, "list": [torch.ones(2), {"a": "text"}], "s": None}
    dcp.save(saved, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_same(saved, await aiostage.load(tmp_path / "dcp"))
    live: dict[str, Any] = {"model": {"w": torch.zeros(2, 3), "n": 0}}
    weight = live["model"]["w"]
    await aiostage.load(tmp_path / "dcp", into=live, only="model")
    assert weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert live["model"]["n"] == 5


@pytest.mark.asyncio
async def test_lightning(tmp_path: Path) -> None:
    checkpoint = {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": OrderedDict(weight=torch.ones(2)),
        "callbacks": {},
        "hyper_parameters": Namespace(lr=0.1),
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(aiostage.CheckpointError, match=r"needs argparse.Namespace, which weights_only") as caught:
        await aiostage.load(tmp_path / "last.ckpt")
    assert "add_safe_globals" in str(caught.value)
    with torch.serialization.safe_globals([Namespace]):
        loaded = await aiostage.load(tmp_path / "last.ckpt", only="state_dict.*")
    assert list(loaded) == ["state_dict"]
    assert loaded["state_dict"]["weight"].tolist() == [1, 1]


@pytest.mark.asyncio
async def test_into_and_only(tmp_path: Path) -> None:
    path = save_single(tmp_path)
    live = {"a.weight": torch.zeros(2, 3), "mine": torch.zeros(1)}
    weight = live["a.weight"]
    await aiostage.load(path, into=live, only="a.weight")
    assert live["a.weight"] is weight
    assert weight.sum() == 15
    with pytest.raises(aiostage.CheckpointMismatchError, match="missing from the checkpoint"):
        await aiostage.load(path, into=live)
    with pytest.raises(ValueError, match=r"'\*.nothing' matches nothing .*\.safetensors. Its first paths are a.weight"):
        await aiostage.load(path, only=["*.nothing", "empty"])
    with pytest.raises(ValueError, match="device= is for checkpoints of aiostage"):
        await aiostage.load(path, device="meta")


class Evil:
    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Evil, "ran", True)


def archive_of(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return buffer.getvalue()


def of_numpy(save: Callable[..., None], *values: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *values)
    return buffer.getvalue()


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "gguf": (lambda: b"GGUF\3\0\0\0", "a GGUF file.*gguf"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n", "an HDF5 file.*h5py"),
    "array": (lambda: of_numpy(np.save, np.ones(2)), "an array of NumPy.*numpy.load"),
    "arrays": (lambda: of_numpy(np.savez, np.ones(2)), "an archive of arrays of NumPy.*numpy.load"),
    "pickle": (lambda: pickle.dumps(Evil()), "a pickle, which can run any code.*pickle.load"),
    "script": (lambda: archive_of(["m/constants.pkl", "m/data.pkl", "m/code/x.py"]), "TorchScript.*torch.jit.load"),
    "program": (lambda: archive_of(["m/archive_format"]), "exported program.*torch.export.load"),
    "zip": (lambda: archive_of(["text.txt"]), "an archive, but not one of torch.save"),
    "empty": (lambda: b"", "an empty file"),
    "half a zip": (lambda: archive_of(["m/data.pkl"])[:-5], "an archive that cannot be opened"),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", REFUSED)
async def test_what_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    write, message = REFUSED[kind]
    (tmp_path / "file").write_bytes(write())
    with pytest.raises(aiostage.CheckpointError, match=message) as caught:
        await aiostage.load(tmp_path / "file")
    assert caught.value.path == str(tmp_path / "file")
    assert not Evil.ran


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["latest", "zero_to_fp32.py"], "a checkpoint of DeepSpeed.*Make one file of it"),
        (["mp_rank_00_model_states.pt"], "a part of a checkpoint of DeepSpeed"),
        (["checkpoint", "model.data-00000-of-00001", "model.index"], "a checkpoint of TensorFlow"),
        (["_CHECKPOINT_METADATA"], "a checkpoint of Orbax"),
        (["__0_0.distcp"], "whose save did not end"),
        (["model_index.json"], "a pipeline of several models of diffusers.*Pass one of its directories"),
        (["optimizer_0", "pytorch_model_fsdp_0", "scheduler.bin"], "of Accelerate, in parts.*Pass one of them"),
    ],
)
async def test_directories_that_cannot_be_read_are_named(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(aiostage.CheckpointError, match=message):
        await aiostage.load(tmp_path)


WEIGHTS = "model.safetensors"


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("main", "others", "message"),
    [
        (
            WEIGHTS,
            ["optimizer.bin", "random_states_0.pkl"],
            r"optimizer.bin, random_s.*Accelerator.load_state",
        ),
        (
            "pytorch_model.bin",
            ["optimizer.bin", "random_states_0.pkl"],
            r"pytorch_model.bin would leave out opt",
        ),
        (WEIGHTS, ["model_1.safetensors"], r"leave out model_1.safetensors\. Pass the path of each part"),
        (WEIGHTS, ["model_ema.bin"], r"leave out model_ema.bin\."),
        (WEIGHTS, ["last.pth.tar"], r"leave out last.pth.tar\."),
        (WEIGHTS, ["pytorch_model_1.bin"], r"leave out pytorch_model_1.bin\."),
        (WEIGHTS, ["trainer_state.json", "optimizer.pt"], r"leave out optimizer.pt\. .*Trainer.train\(resume_from"),
        (
            "adapter_model.safetensors",
            ["scheduler.pt"],
            r"_model.safetensors would leave out scheduler.pt",
        ),
        ("adapter_model.safetensors", ["pytorch_model.bin"], r"leave out pytorch_model.bin\."),
        (WEIGHTS, ["latest", "zero_to_fp32.py", "global_step5/bf16_optim_states.pt"], r"leave out global_step5\."),
        (WEIGHTS, ["modules.json", "2_Dense/model.safetensors"], r"leave out 2_Dense\. .*SentenceTransformer\(\)"),
        (WEIGHTS, ["__0_0.distcp"], r"leave out __0_0.distcp\."),
        (WEIGHTS, ["optimizer/rank_0.pt"], r"leave out optimizer\."),
        (WEIGHTS, ["optimizer/.metadata", "optimizer/__0_0.distcp"], r"leave out optimizer\."),
        (WEIGHTS, ["unet_ema/diffusion_pytorch_model.safetensors"], r"leave out unet_ema\."),
        (WEIGHTS, ["state/ranks/0.pt", "images/cat.png"], r"leave out state\."),
        (WEIGHTS, ["state/host/0/rank/1/shard/0.pt", "images/cat.png"], r"leave out state\."),
        ("adapter_model.safetensors", ["reference/adapter_model.safetensors"], r"leave out reference\."),
        (".metadata", ["dataloader/rank_0.pt"], r"leave out dataloader\."),
        ("model.safetensors.index.json", ["model-00003-of-00003.safetensors"], r"leave out model-00003-of-00003"),
        (".metadata", ["meta.pt"], r"reading .metadata would leave out meta.pt\. .*Lightning"),
        (".metadata", [WEIGHTS], r"reading .metadata would leave out model.safetensors\."),
    ],
)
async def test_no_part_is_left_out_silently(main: str, others: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    if main == ".metadata":
        dcp.save(flat(), checkpoint_id=path, no_dist=True)
    else:
        path.mkdir()
        (path / "config.json").write_text("{}")
        if main.endswith(".json"):
            save_hub(path)
        elif main.endswith(".bin"):
            save_hub_torch(path)
        else:
            save_file(flat(), path / main)
    assert_same(flat(), await aiostage.load(path))
    for name in others:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x")
    with pytest.raises(aiostage.CheckpointError, match=message) as caught:
        await aiostage.load(path)
    assert caught.value.path == str(path)
    assert f"such as {path / main}" in str(caught.value)
    assert_same(flat(), await aiostage.load(path / main))


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["model-00001-of-00002", "model-00002-of-00010.fp16", "a.bf16-00001-of-00003"])
async def test_one_of_several_files_is_not_taken_for_all(name: str, tmp_path: Path) -> None:
    """As an interrupted download leaves them."""
    path = tmp_path / f"{name}.safetensors"
    save_file(flat(), path)
    with pytest.raises(aiostage.CheckpointError, match=r"file \d of \d+ of some weights, without .* Fetch the others"):
        await aiostage.load(tmp_path)
    assert_same(flat(), await aiostage.load(path))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "others",
    [
        ["config.json", "tokenizer.json", "README.md", ".gitattributes", "merges.txt", "sentencepiece.bpe.model"],
        ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "onnx/model.onnx"],
        ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"],
        ["model.bin", "training_args.bin", "original/consolidated.00.pth", "1_Pooling/config.json"],
        ["checkpoint-500/model.safetensors", "checkpoint-500/optimizer.pt"],
        ["model.fp16.safetensors", "pytorch_model.fp16.bin", "model.onnx", "openvino_model.bin", "openvino_model.xml"],
        ["model.bf16-00001-of-00002.safetensors", "model-00001-of-00002.fp16.safetensors", "openvino_tokenizer.bin"],
        ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "ggml-model-q4_0.bin"],
        ["model.fp32-00001-of-00002.safetensors", "pytorch_model.fp32-00001-of-00002.bin", "flax_model.msgpack"],
        ["openvino/openvino_model.bin", "onnx/model.bin", "metal/model.bin", "original/model.safetensors"],
        [
            "lightning_logs/version_0/checkpoints/epoch=0-step=1.ckpt",
            "tb_logs/a/last.ckpt",
            "mlruns/0/a/artifacts/x.pkl",
        ],
        ["coreml/model.mlpackage/weights/weight.bin", "Encoder.mlmodelc/weights/weight.bin"],
        ["images/cat.png", ".cache/huggingface/x.bin", "gguf/q4.bin"],
        ["tokenizer/vocab.json", "tokenizer/images/a.png", "runs/events.pt", "voices/one.wav", "step-5/optimizer.pt"],
    ],
)
async def test_what_hubs_have_beside_weights_is_no_part(others: list[str], tmp_path: Path) -> None:
    save_file(flat(), tmp_path / WEIGHTS)
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert_same(flat(), await aiostage.load(tmp_path))


@pytest.mark.asyncio
async def test_links_and_data_sets_beside_weights_are_not_searched_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "model"
    (path / "data").mkdir(parents=True)
    save_file(flat(), path / WEIGHTS)
    (tmp_path / "0.pt").write_bytes(b"x")
    (path / "data" / "link").symlink_to(tmp_path)
    (path / "data" / "circle").symlink_to(path / "data")
    assert_same(flat(), await aiostage.load(path))
    for number in range(1100):
        (path / "data" / f"{number}").mkdir()
        (path / "data" / f"{number}" / "below").mkdir()
    (path / "data" / "1099" / "below" / "late.pt").write_bytes(b"x")
    assert_same(flat(), await aiostage.load(path))


@pytest.mark.asyncio
@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "a [1]"])
@pytest.mark.parametrize("variant", ["{}.fp16", "{}.bf16", "{}.fp16-00001-of-00001", "{}-00001-of-00001.fp16"])
async def test_of_two_precisions_the_usual_one_is_loaded(stem: str, variant: str, tmp_path: Path) -> None:
    save_file(flat(), tmp_path / f"{stem}.safetensors")
    save_file({"half": torch.ones(1)}, tmp_path / f"{variant.format(stem)}.safetensors")
    (tmp_path / f"{stem}.safetensors.index.fp16.json").write_text("{}")
    assert_same(flat(), await aiostage.load(tmp_path))
    # Other weights, not the same ones in another precision.
    save_file({}, tmp_path / f"{stem}.non_ema.safetensors")
    with pytest.raises(aiostage.CheckpointError, match=r"a directory with 2 such files: .*non_ema.*Pass one of them"):
        await aiostage.load(tmp_path)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "adapter_model.bin"])
async def test_files_of_torch_of_other_names(name: str, tmp_path: Path) -> None:
    torch.save(flat(), tmp_path / name)
    torch.save({}, tmp_path / name.replace(".bin", ".fp16.bin"))
    assert_same(flat(), await aiostage.load(tmp_path))


@pytest.mark.asyncio
async def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    """As a download leaves them that did not end, or a cache of which a part was removed."""
    save_file(flat(), tmp_path / WEIGHTS)
    for name in ("other.safetensors", "optimizer.pt"):
        (tmp_path / name).symlink_to("../blobs/0123")
    with pytest.raises(aiostage.CheckpointError, match=r"would leave out optimizer.pt, other.safetensors\."):
        await aiostage.load(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / WEIGHTS).symlink_to("../blobs/4567")
    message = r"it is a link to \.\./blobs/4567, which is not there"
    with pytest.raises(aiostage.CheckpointCorruptError, match=message) as caught:
        await aiostage.load(tmp_path)
    assert caught.value.path == str(tmp_path / WEIGHTS)
    where = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(where))
    (tmp_path / "model-00001-of-00001.safetensors").symlink_to("../blobs/4567")
    with pytest.raises(aiostage.CheckpointCorruptError, match=message):
        await aiostage.load(tmp_path / f"{WEIGHTS}.index.json")
    (tmp_path / f"{WEIGHTS}.index.json").unlink()
    (tmp_path / f"{WEIGHTS}.index.json").symlink_to("../blobs/4567")
    with pytest.raises(aiostage.CheckpointCorruptError, match=message):
        await aiostage.load(tmp_path)


@pytest.mark.asyncio
async def test_no_fifo_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(aiostage.CheckpointCorruptError, match="not a regular file"):
        await aiostage.load(tmp_path)
    os.mkfifo(tmp_path / "x.safetensors.index.json")
    with pytest.raises(aiostage.CheckpointCorruptError, match="not a regular file"):
        await aiostage.load(tmp_path)


@pytest.mark.asyncio
async def test_half_precision_beside_weights_of_torch_is_no_part(tmp_path: Path) -> None:
    torch.save(flat(), tmp_path / "pytorch_model.bin")
    torch.save({}, tmp_path / "pytorch_model.fp16.bin")
    assert_same(flat(), await aiostage.load(tmp_path))
    # A second model of Accelerate's.
    torch.save({}, tmp_path / "pytorch_model_1.bin")
    with pytest.raises(aiostage.CheckpointError, match=r"would leave out pytorch_model_1\.bin\."):
        await aiostage.load(tmp_path)


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
async def test_chunks_of_tensors_are_not_taken_for_tensors(tmp_path: Path) -> None:
    whole, several = tmp_path / "whole", tmp_path / "several"
    dcp.save(flat(), storage_writer=HuggingFaceStorageWriter(str(whole), save_distributed=True), no_dist=True)
    (file,) = whole.glob("shard-*")
    assert_same(flat(), await aiostage.load(whole))
    # As another rank has it: it begins behind what the first has.
    several.mkdir()
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    metadata["DCP_SHARDING_INFO"] = metadata["DCP_SHARDING_INFO"].replace("[0, 0]", "[2, 0]")
    save_file(flat(), several / "shard-00002-model-00001-of-00001.safetensors", metadata=metadata)
    message = "chunks of tensors .* HuggingFaceStorageReader"
    for path in (several, next(several.iterdir())):
        with pytest.raises(aiostage.CheckpointError, match=message):
            await aiostage.load(path)
    first = several / file.name
    first.write_bytes(file.read_bytes())
    for path in (several, first):
        with pytest.raises(aiostage.CheckpointError, match=message):
            await aiostage.load(path)


@pytest.mark.asyncio
async def test_the_index_says_which_shard_counts(tmp_path: Path) -> None:
    one, two = {"a": torch.zeros(2), "b": torch.ones(2)}, {"a": torch.full((2,), 2.0)}
    save_file(one, tmp_path / "model-1.safetensors")
    save_file(two, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "model-1.safetensors", "a": "model-1.safetensors"}}))
    with pytest.raises(aiostage.CheckpointError, match=r"would leave out model-2\.safetensors"):
        await aiostage.load(tmp_path)
    where = {"b": "model-1.safetensors", "a": "model-1.safetensors", "c": "model-2.safetensors"}
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(aiostage.CheckpointCorruptError, match="names 'c', which its shard does not have"):
        await aiostage.load(tmp_path)
    save_file(two | {"c": torch.ones(1)}, tmp_path / "model-2.safetensors")
    assert (await aiostage.load(tmp_path))["a"].tolist() == [0, 0]
    index.write_text(json.dumps({"weight_map": {"b": "model-1.safetensors", "c": "model-2.safetensors"}}))
    with pytest.raises(aiostage.CheckpointCorruptError, match="another shard has 'a' too"):
        await aiostage.load(tmp_path)


@pytest.mark.asyncio
async def test_what_is_nothing_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty").mkdir()
    for name in ("text", "empty", "missing"):
        with pytest.raises(aiostage.CheckpointNotFoundError):
            await aiostage.load(tmp_path / name)


@pytest.mark.asyncio
async def test_code_in_files_of_torch_is_not_run(tmp_path: Path) -> None:
    for new in (True, False):
        torch.save({"a": Evil()}, tmp_path / "evil.pt", _use_new_zipfile_serialization=new)
        with pytest.raises(aiostage.CheckpointError, match=r"that needs \S*setattr, which"):
            await aiostage.load(tmp_path / "evil.pt")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(aiostage.CheckpointError, match=r"needs code: it names builtins\.setattr"):
        await aiostage.load(tmp_path / "dcp")
    assert not Evil.ran


@pytest.mark.asyncio
async def test_damage(tmp_path: Path) -> None:
    path = save_torch(tmp_path)
    data = bytearray(path.read_bytes())
    data[data.find(torch.tensor(4.0).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(aiostage.CheckpointCorruptError, match="does not match its checksum"):
        await aiostage.load(path)
    single = save_single(tmp_path)
    whole = single.read_bytes()
    for cut in (3, 9, len(whole) // 2, len(whole) - 1):
        single.write_bytes(whole[:cut])
        with pytest.raises((aiostage.CheckpointCorruptError, aiostage.CheckpointNotFoundError)):
            await aiostage.load(single)
    hub = save_hub(tmp_path)
    (hub / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(aiostage.CheckpointCorruptError, match="the index names it, and it is missing"):
        await aiostage.load(hub / "model.safetensors.index.json")
    index = hub / "model.safetensors.index.json"
    for text in ("[]", "{", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": [1]}}'):
        index.write_text(text)
        with pytest.raises(aiostage.CheckpointCorruptError, match="not an index of shards"):
            await aiostage.load(index)


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
async def test_damaged_distributed_checkpoints(tmp_path: Path) -> None:
    dcp.save({"w": torch.arange(6.0)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    data = (tmp_path / "dcp" / "__0_0.distcp").read_bytes()
    (tmp_path / "dcp" / "__0_0.distcp").write_bytes(data[:-20])
    with pytest.raises(aiostage.CheckpointCorruptError, match="ends before byte"):
        await aiostage.load(tmp_path / "dcp")
    # Not FileNotFoundError, by which callers learn that there is no checkpoint.
    (tmp_path / "dcp" / "__0_0.distcp").unlink()
    with pytest.raises(aiostage.CheckpointCorruptError, match=r"__0_0\.distcp: the file is missing"):
        await aiostage.load(tmp_path / "dcp")
    os.mkfifo(tmp_path / "dcp" / "__0_0.distcp")
    with pytest.raises(aiostage.CheckpointCorruptError, match=r"__0_0\.distcp: it is not a regular file"):
        await aiostage.load(tmp_path / "dcp")
    about = (tmp_path / "dcp" / ".metadata").read_bytes()
    (tmp_path / "dcp" / ".metadata").write_bytes(about.replace(b"__0_0.distcp", b"../../passwd"))
    with pytest.raises(aiostage.CheckpointCorruptError, match="not a plain file"):
        await aiostage.load(tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").unlink()
    os.mkfifo(tmp_path / "dcp" / ".metadata")
    with pytest.raises(aiostage.CheckpointCorruptError, match=r"\.metadata: it is not a regular file"):
        await aiostage.load(tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").unlink()
    with pytest.raises(aiostage.CheckpointError, match=r"without its \.metadata"):
        await aiostage.load(tmp_path / "dcp")


def test_from_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_torch(tmp_path)
    assert main(["convert", str(path), str(tmp_path / "new")]) == 0
    assert "2 tensors, 36 bytes" in capsys.readouterr().out
    assert main(["convert", str(path), str(tmp_path / "new")]) == 3
    assert str(tmp_path / "new") in capsys.readouterr().err
    assert main(["convert", str(path), str(tmp_path / "new"), "--overwrite"]) == 0
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == {"model.weight", "model.bias"}
    assert main(["convert", str(path), str(tmp_path / "each"), "--duplicate-tied"]) == 0
    assert load_file(tmp_path / "each" / "model.safetensors").keys() == {"model.weight", "model.tied", "model.bias"}


def test_a_shell_says_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run" / "checkpoint-5"
    path.mkdir(parents=True)
    save_file(flat(), path / WEIGHTS)
    torch.save({"state": {}}, path / "optimizer.pt")
    (path / "global_step5").mkdir()
    (path / "global_step5" / "optim_states.pt").write_bytes(b"1234")
    (path / "global_step5" / "rank").mkdir()
    (path / "global_step5" / "rank" / "0.pt").write_bytes(b"5")
    (path / "global_step5" / "nowhere.pt").symlink_to("nowhere")
    for command in ("ls", "inspect"):
        assert main([command, str(path)]) == 0
        assert "safetensors, without global_step5, optimizer.pt" in capsys.readouterr().out
    assert main(["verify", str(path)]) == 0
    assert "not looked at: global_step5, optimizer.pt)" in capsys.readouterr().out
    assert main(["du", "--json", str(path)]) == 0
    nbytes = sum((path / name).stat().st_size for name in (WEIGHTS, "optimizer.pt")) + 5
    assert json.loads(capsys.readouterr().out)["total_bytes"] == nbytes
    for command in (["diff", str(path), str(path / WEIGHTS)], ["convert", str(path), str(tmp_path / "new")]):
        assert main(command) == 3
        assert f"would leave out global_step5, optimizer.pt. Pass the path of each part, such as {path}" in (
            capsys.readouterr().err
        )


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("second", [(0, 3), (1, 3), (-3, 3)])
async def test_chunks_that_leave_memory_uninitialized(second: tuple[int, int], tmp_path: Path) -> None:
    dcp.save({"w": torch.arange(3.0)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    path = tmp_path / "dcp" / ".metadata"
    about = pickle.loads(path.read_bytes())
    entry = about.state_dict_metadata["w"]
    entry.size = torch.Size((6,))
    entry.chunks.append(type(entry.chunks[0])(torch.Size(second[:1]), torch.Size(second[1:])))
    (index, place) = about.storage_data.popitem()
    for chunk in entry.chunks:
        about.storage_data[type(index)(index.fqn, chunk.offsets)] = place
    path.write_bytes(pickle.dumps(about))
    with pytest.raises(aiostage.CheckpointCorruptError, match=r"do not cover it|outside of it"):
        await aiostage.load(tmp_path / "dcp")


@pytest.mark.asyncio
async def test_a_part_of_a_tree_with_too_many_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiostage.checkpoint.selection._MAX_PATHS", 1000)
    ladder: list[Any] = []
    for _ in range(60):
        ladder = [ladder, ladder]
    torch.save({"w": torch.ones(1), "ladder": ladder}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="has more"):
        await aiostage.load(tmp_path / "a.pt", only="w")
    assert (await aiostage.load(tmp_path / "a.pt"))["w"].item() == 1
