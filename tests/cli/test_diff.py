"""How two checkpoints differ."""

from __future__ import annotations

import asyncio
import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import aiostage
from aiostage import dcp
from aiostage.cli import diff as module
from aiostage.cli.diff import Difference, difference
from aiostage_command import main

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

Shown = pytest.CaptureFixture[str]


def save(state: Any, path: Path) -> Path:
    return asyncio.run(aiostage.save(state, path)).path


def tree() -> dict[str, Any]:
    weight = torch.arange(6.0).view(2, 3)
    return {
        "model": OrderedDict(w=weight, tied=weight, half=torch.ones(3).bfloat16(), t=weight.t()),
        "step": 7,
        "names": ["a", ("b", 1.5)],
        "nothing": [],
    }


def diff(capsys: Shown, first: Path, second: Path, *options: str) -> list[str]:
    capsys.readouterr()
    status = main(["diff", *options, str(first), str(second)])
    lines = capsys.readouterr().out.splitlines()
    assert status == (0 if len(lines) == 1 else 1)
    return lines


def test_everything_that_differs_is_reported(tmp_path: Path, capsys: Shown) -> None:
    first, second = tree(), tree()
    second["model"]["w"][1, 1] += 2
    second["model"]["half"] = torch.ones(4)
    second["model"]["new"] = torch.zeros(2)
    second["step"] = 8
    second["names"] = ["a"]
    second["nothing"] = {}
    second["model"]["more"] = {}
    lines = diff(capsys, save(first, tmp_path / "a"), save(second, tmp_path / "b"))
    assert sorted(lines[:-1]) == sorted(
        [
            "names.1.0: only in the first: 'b'",
            "names.1.1: only in the first: 1.5",
            "model.new: only in the second: tensor F32 (2,)",
            "model.more: only in the second: dict of 0",
            "step: 7 became 8",
            "nothing: list became dict",
            "model.half: BF16 (3,) became F32 (4,)",
            "model.w: 1 of 6 elements differ, by 2 at most",
            "model.t: 1 of 6 elements differ, by 2 at most",
        ]
    )
    assert lines[-1] == "9 differences; 2 tensors of the same shape and dtype, compared element by element"
    assert "model.w" not in "".join(diff(capsys, tmp_path / "a", tmp_path / "b", "--no-values"))
    assert main(["diff", "--json", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {"path": ["model", "w"], "difference": "elements", "count": 1, "of": 6, "max_abs": 2.0, "nans": 0} in found[
        "differences"
    ]


def test_what_is_not_a_plain_tensor(tmp_path: Path, capsys: Shown) -> None:
    def odd(number: float) -> dict[str, Any]:
        return {
            "sparse": (torch.eye(3) * number).to_sparse(),
            "quantized": torch.quantize_per_tensor(torch.ones(3) * number, 0.1, 0, torch.qint8),
            "bytes": b"x" * int(number),
            "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=number == 1),
            (1, "key"): number,
        }

    assert len(diff(capsys, save(odd(1), tmp_path / "a"), save(odd(1), tmp_path / "b"))) == 1
    lines = diff(capsys, tmp_path / "a", save(odd(2), tmp_path / "c"))
    assert {line.partition(":")[0].partition(".<")[0] for line in lines[:-1]} == {
        "sparse",
        "quantized",
        "bytes",
        "parameter",
        "(1, 'key')",
    }


def test_across_formats(tmp_path: Path, capsys: Shown) -> None:
    ours = save(tree(), tmp_path / "ours")
    torch.save(tree(), tmp_path / "f.pt")
    torch.save(tree(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert len(diff(capsys, ours, tmp_path / "f.pt")) == 1
    assert len(diff(capsys, tmp_path / "legacy.pt", ours)) == 1
    state = tree()
    del state["nothing"]
    writer = dcp.StorageWriter(tmp_path / "ranks")
    asyncio.run(dcp.save(state, checkpoint_id="one", storage_writer=writer, no_dist=True))
    torch_dcp.save(state, checkpoint_id=tmp_path / "theirs", no_dist=True)
    assert len(diff(capsys, tmp_path / "ranks" / "one", tmp_path / "theirs")) == 1
    # Formats without containers do not know of empty ones, and keep tuples as one value or not.
    assert [line.partition(":")[0] for line in diff(capsys, ours, tmp_path / "theirs")[:-1]] == ["nothing"]
    flat = {f"model.{name}": value.contiguous().clone() for name, value in tree()["model"].items()}
    save_file(flat, tmp_path / "f.safetensors")
    lines = diff(capsys, ours, tmp_path / "f.safetensors")
    assert not [line for line in lines[:-1] if line.startswith("model.")]
    flat["model.w"][0, 0] = 5
    save_file(flat, tmp_path / "f.safetensors")
    assert "model.w: 1 of 6 elements differ, by 5 at most" in diff(capsys, ours, tmp_path / "f.safetensors")


def test_values_and_attributes_across_formats(tmp_path: Path, capsys: Shown) -> None:
    model = torch.nn.Linear(2, 2).state_dict()
    state = {
        "model": model,
        "values": [float("nan"), 2**70, 1j, torch.bfloat16, torch.Size([1, 2]), torch.device("cpu"), bytearray(b"a")],
    }
    ours = save(state, tmp_path / "ours")
    torch.save(state, tmp_path / "f.pt")
    assert diff(capsys, ours, tmp_path / "f.pt") == [
        "no difference; 2 tensors of the same shape and dtype, compared element by element"
    ]
    model._metadata[""]["version"] = 2  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "f.pt")
    assert diff(capsys, ours, tmp_path / "f.pt")[0] == "model.<_metadata>..version: 1 became 2"
    # A format that has no attributes does not differ by them.
    save_file(dict(model), tmp_path / "f.safetensors")
    save(model, tmp_path / "flat")
    assert len(diff(capsys, tmp_path / "flat", tmp_path / "f.safetensors")) == 1
    assert main(["inspect", str(ours)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert {"values.0 = nan", f"values.1 = {2**70}", "values.2: complex 1j"} < set(shown)


def test_tensors_are_read_a_few_at_a_time(tmp_path: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {str(number): torch.full((1 << 18,), number, dtype=torch.uint8) for number in range(40)}
    first, second = save(state, tmp_path / "a"), save(state, tmp_path / "b")
    monkeypatch.setattr(module, "_BATCH_BYTES", 4 << 18)
    batches: list[int] = []
    cut = module._batches

    def counted(pairs: Any) -> Any:
        for batch in cut(pairs):
            batches.append(sum(one.nbytes for one, _ in batch))
            yield batch

    monkeypatch.setattr(module, "_batches", counted)
    assert len(diff(capsys, first, second)) == 1
    assert batches == [4 << 18] * 10


def test_what_cannot_be_compared(tmp_path: Path, capsys: Shown) -> None:
    one = save({"w": torch.zeros(3)}, tmp_path / "run" / "a")
    assert main(["diff", str(one), str(tmp_path / "run")]) == 3
    assert "it is a run of 1 checkpoint. Name one of them." in capsys.readouterr().err
    assert main(["diff", str(one), str(tmp_path / "missing")]) == 3
    with (one / "model.safetensors").open("r+b") as file:
        file.seek(4097)
        file.write(b"x")
    other = save({"w": torch.zeros(3)}, tmp_path / "b")
    assert main(["diff", str(other), str(one)]) == 1
    assert "do not match their checksum" in capsys.readouterr().err


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("dtype", "one", "two", "expected"),
    [
        (torch.float32, [1, NAN, INF], [1, NAN, INF], Difference()),
        (torch.float32, [1, NAN, 2], [1.5, 3, NAN], Difference(3, 0.5, 2)),
        (torch.float32, [INF, -INF, 1], [-INF, -INF, INF], Difference(2, INF)),
        (torch.float32, [0.0], [-0.0], Difference(1, 0.0)),
        (torch.bfloat16, [1, 2], [1, 3], Difference(1, 1.0)),
        (torch.float8_e4m3fn, [1, 2], [1, 3], Difference(1, 1.0)),
        (torch.complex64, [1, 2j], [1, 2], Difference(1, abs(2 - 2j))),
        (torch.bool, [True, False], [True, True], Difference(1, 1.0)),
        (torch.uint8, [0, 255], [255, 255], Difference(1, 255.0)),
        (torch.int64, [-(2**63)], [2**63 - 1], Difference(1, float(2**64 - 1))),
        (torch.uint64, [0, 5], [2**64 - 1, 5], Difference(1, float(2**64 - 1))),
        (torch.uint16, [1], [65535], Difference(1, 65534.0)),
        (torch.float32, [], [], Difference()),
    ],
)
def test_difference(dtype: torch.dtype, one: list[Any], two: list[Any], expected: Difference) -> None:
    first, second = torch.tensor(one, dtype=dtype), torch.tensor(two, dtype=dtype)
    assert difference(first, second) == difference(second, first) == expected


def test_packed_numbers_are_compared_bit_by_bit() -> None:
    one = torch.tensor([1, 2], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    two = torch.tensor([1, 3], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert difference(one, two) == Difference(1, None)


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=30),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=30, max_size=30),
)
def test_integers_are_exact(one: list[int], two: list[int]) -> None:
    pairs = list(zip(one, two, strict=False))
    first, second = torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    assert difference(first, second) == Difference(
        sum(a != b for a, b in pairs), float(max(abs(a - b) for a, b in pairs))
    )


def test_chunks_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 7)
    one = torch.arange(100.0).view(10, 10)
    two = one.clone()
    two[3, 3] += 5
    two[9, 9] -= 2
    two[0, 5] = NAN
    assert difference(one.t(), two.t()) == Difference(3, 5.0, 1)
