"""What PyTorch's stagers do to odd leaves (docs/compatibility.md), and that aiostage does it right."""

from __future__ import annotations

import asyncio
import copy
import io
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.staging import StagingOptions as TorchStagingOptions

from aiostage import AsyncStager, StagingOptions, TornSnapshotError, UnsupportedLeafError
from tests.descriptors import SHARED_MEMORY, opened
from tests.device.accelerators import default_stager_stages_again
from tests.staging.holding import copies_held


def torch_stager() -> DefaultStager:
    return DefaultStager(TorchStagingOptions(False, False, False, False))


def theirs(tree: Any) -> Any:
    return torch_stager().stage(tree)


def ours(tree: Any, options: StagingOptions | None = None) -> Any:
    async def stage() -> Any:
        async with AsyncStager(options) as stager:
            return await stager.stage(tree)

    return asyncio.run(stage())


def test_a_second_staging_leaves_the_first_alone() -> None:
    tree = {"a": torch.ones(3)}
    peer = torch_stager()
    first = peer.stage(tree)
    tree["a"].fill_(2)
    if default_stager_stages_again():
        peer.stage(tree)
        assert first["a"].tolist() == [2, 2, 2]

    async def twice() -> Any:
        async with AsyncStager() as stager:
            first = await stager.stage(tree)
            tree["a"].fill_(3)
            return first, await stager.stage(tree)

    first, second = asyncio.run(twice())
    assert (first["a"].tolist(), second["a"].tolist()) == ([2, 2, 2], [3, 3, 3])


@pytest.mark.parametrize(
    "view",
    [torch._neg_view(torch.tensor([2.0])), torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]).conj().imag],
    ids=["negative", "conjugate", "imaginary part of a conjugate"],
)
def test_conjugate_and_negative_views(view: torch.Tensor) -> None:
    assert not torch.equal(theirs({"a": view})["a"], view)
    staged = ours({"a": view})["a"]
    assert torch.equal(staged, view)
    assert torch.equal(staged.resolve_conj().resolve_neg(), view)


@pytest.mark.filterwarnings("ignore")
def test_quantized() -> None:
    tensor = torch.quantize_per_tensor(torch.tensor([1.0, 2.0]), 0.1, 10, torch.quint8)
    channels = torch.quantize_per_channel(
        torch.ones(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([1, 2]), 0, torch.qint8
    )
    staged = ours({"a": tensor, "b": channels})
    assert torch.equal(staged["a"].dequantize(), tensor.dequantize())
    assert staged["a"].q_scale() == tensor.q_scale()
    assert torch.equal(staged["b"].dequantize(), channels.dequantize())
    torch.save(staged, io.BytesIO())


def test_a_view_of_a_large_base_stages_what_it_covers() -> None:
    view = torch.zeros(10_000_000)[5:15]
    assert theirs({"a": view})["a"].untyped_storage().nbytes() == 40_000_000
    assert ours({"a": view})["a"].untyped_storage().nbytes() == 40


def test_parameters_stay_parameters() -> None:
    tree = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Parameter(torch.ones(2), requires_grad=False)}
    assert type(theirs(tree)["a"]) is torch.Tensor
    staged = ours(tree)
    assert type(staged["a"]) is type(staged["b"]) is torch.nn.Parameter
    assert (staged["a"].requires_grad, staged["b"].requires_grad) == (True, False)


class Holder:
    """Copies itself, as modules' hooks and schedulers do."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Holder:
        return Holder(copy.deepcopy(self.tensor, memo))


@pytest.mark.parametrize("holder_first", [True, False])
def test_an_object_that_copies_itself_and_its_twin(holder_first: bool) -> None:
    tensor = torch.ones(2)
    names = ["holder", "twin"] if holder_first else ["twin", "holder"]
    tree = {name: {"holder": Holder(tensor), "twin": tensor}[name] for name in names}
    staged = ours(tree)
    assert staged["holder"].tensor is staged["twin"]
    tensor.zero_()
    assert staged["twin"].tolist() == [1, 1]


def test_a_bound_method_on_a_tensor_is_code() -> None:
    module = torch.nn.Linear(2, 2)
    tensor = torch.ones(2)
    tensor.loader = module.forward  # type: ignore[attr-defined]
    staged = ours({"a": tensor})["a"]
    assert staged.loader.__self__ is module


@pytest.mark.filterwarnings("ignore")
def test_sparse_and_jagged() -> None:
    coo = torch.eye(3).to_sparse()
    csr = torch.eye(3).to_sparse_csr()
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)], layout=torch.jagged)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is, it names no path
        theirs({"a": coo})
    staged = ours({"coo": coo, "csr": csr, "jagged": jagged})
    assert torch.equal(staged["coo"].to_dense(), torch.eye(3))
    assert torch.equal(staged["csr"].to_dense(), torch.eye(3))
    assert [part.tolist() for part in staged["jagged"].unbind()] == [part.tolist() for part in jagged.unbind()]


@pytest.mark.parametrize(
    "make",
    [lambda: torch.empty(3, device="meta"), lambda: torch.ones(4, 4).to_mkldnn()],
    ids=["meta", "mkldnn"],
)
def test_what_cannot_be_staged_is_refused_by_path(make: Any) -> None:
    with pytest.raises(UnsupportedLeafError) as caught:
        ours({"layers": [{"w": make()}]})
    assert caught.value.path == "state_dict['layers'][0]['w']"


def test_fake_tensors_are_refused() -> None:
    with FakeTensorMode():
        fake = torch.ones(2)
    with pytest.raises(UnsupportedLeafError, match="FakeTensor"):
        ours({"a": fake})


def test_a_storage_resized_to_zero_is_refused() -> None:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedLeafError, match="smaller than its elements") as caught:
        ours({"a": tensor})
    assert caught.value.path == "state_dict['a']"


def test_a_storage_resized_between_stagings() -> None:
    tensor = torch.ones(4)

    async def run() -> Any:
        async with AsyncStager() as stager:
            for _ in range(4):
                await stager.stage({"a": tensor})
            tensor.resize_(9).fill_(5)
            staged = await stager.stage({"a": tensor})
            tensor.untyped_storage().resize_(0)
            with pytest.raises(UnsupportedLeafError):
                await stager.stage({"a": tensor})
            return staged

    assert asyncio.run(run())["a"].tolist() == [5] * 9


@pytest.mark.asyncio
@pytest.mark.parametrize("change", [{"step": 2}, {"new": 1}], ids=["rebound", "added"])
async def test_a_late_change_is_torn(change: dict[str, int]) -> None:
    tree: dict[str, Any] = {"step": 1, "a": torch.ones(3)}
    async with AsyncStager() as stager:
        with copies_held(stager) as release:
            async with stager.snapshot(tree) as snapshot:
                tree.update(change)
                release.set()
                with pytest.raises(TornSnapshotError):
                    await snapshot.captured()


def test_descriptors_do_not_follow_the_tensors() -> None:
    before = opened(SHARED_MEMORY)

    async def run() -> int:
        async with AsyncStager(StagingOptions(use_shared_memory=True)) as stager:
            staged = await stager.stage([torch.ones(2) for _ in range(500)])
            assert len(staged) == 500
            return len(opened(SHARED_MEMORY) - before)

    assert 1 <= asyncio.run(run()) < 16


@pytest.mark.filterwarnings("ignore")
def test_the_default_options_need_no_accelerator() -> None:
    if not torch.accelerator.is_available():
        with pytest.raises(AssertionError):
            DefaultStager().stage({"a": torch.ones(1)})
    assert ours({"a": torch.ones(1)})["a"].tolist() == [1]


@dataclass(frozen=True, slots=True)
class Point:
    x: torch.Tensor
    y: int


def test_what_was_right_stays_right() -> None:
    tree = {
        "zero": torch.empty(0, 3),
        "expanded": torch.ones(1).expand(4),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "point": Point(torch.ones(2), 3),
        "default": defaultdict(list, a=[torch.ones(1)]),
        "numpy": np.arange(3),
    }
    staged = ours(tree)
    assert staged["zero"].shape == (0, 3)
    assert (staged["expanded"].stride(), staged["expanded"].tolist()) == ((0,), [1, 1, 1, 1])
    assert torch.equal(staged["float8"].view(torch.uint8), tree["float8"].view(torch.uint8))  # type: ignore[attr-defined]
    assert type(staged["point"]) is Point
    assert staged["point"].x is not tree["point"].x  # type: ignore[attr-defined]
    assert staged["default"].default_factory is list
    assert staged["numpy"] is not tree["numpy"]
    assert staged["numpy"].tolist() == [0, 1, 2]
