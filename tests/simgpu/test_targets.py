"""Restoring and loading in place check every live tensor before the first is written to, on devices as in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

import aiostage
from aiostage import AsyncStager, CheckpointMismatchError
from aiostage._device import TorchBackend

pytestmark = pytest.mark.asyncio

Tree = dict[str, torch.Tensor]
Put = Callable[[Tree, Tree, Path], Awaitable[object]]


async def restore(saved: Tree, into: Tree, path: Path) -> None:
    async with AsyncStager() as stager:
        await stager.restore(saved, into=into)


async def load_into(saved: Tree, into: Tree, path: Path) -> None:
    await aiostage.save(saved, path / "checkpoint")
    await aiostage.load(path / "checkpoint", into=into)


async def load_in_place(saved: Tree, into: Tree, path: Path) -> None:
    await aiostage.save(saved, path / "checkpoint")
    await aiostage.load(path / "checkpoint", into=into, in_place=True)


def empty_storage(device: str) -> torch.Tensor:
    tensor = torch.zeros(4, device=device)
    tensor.untyped_storage().resize_(0)
    return tensor


def inference(device: str) -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(4, device=device)


REFUSED: dict[str, tuple[Callable[[str], torch.Tensor], str]] = {
    "expanded": (lambda device: torch.zeros(1, device=device).expand(4), "expanded"),
    "windows": (lambda device: torch.zeros(3, device=device).as_strided((2, 2), (1, 1)).view(2, 2), "share memory"),
    "inference": (inference, "inference mode"),
    "no storage": (empty_storage, "storage is smaller"),
    "meta": (lambda device: torch.zeros(4, device="meta"), "meta device"),
}


@pytest.mark.parametrize("put", [restore, load_into, load_in_place])
@pytest.mark.parametrize("device", ["cpu", "simgpu:0", "simgpu:1"])
class TestTargets:
    @pytest.mark.parametrize("kind", REFUSED)
    async def test_that_cannot_be_written_are_named_and_nothing_is_changed(
        self, put: Put, device: str, kind: str, tmp_path: Path
    ) -> None:
        make, reason = REFUSED[kind]
        bad = make(device)
        first, last = torch.ones(4, device=device), torch.ones(4, device=device)
        saved = {"first": torch.zeros(4), "bad": torch.zeros(bad.shape), "last": torch.zeros(4)}
        if put is restore:
            # What no leaf of a state dict can be is refused as such.
            reason = {"no storage": "its storage of 0 bytes is smaller", "meta": "is a meta tensor"}.get(kind, reason)
        with pytest.raises(Exception, match=reason) as caught:
            await put(saved, {"first": first, "bad": bad, "last": last}, tmp_path)
        if kind in ("expanded", "windows", "inference"):
            assert isinstance(caught.value, CheckpointMismatchError)
        assert "bad" in str(caught.value)
        assert first.tolist() == last.tolist() == [1] * 4

    async def test_that_overlap_where_the_values_do_not(self, put: Put, device: str, tmp_path: Path) -> None:
        base = torch.ones(6, device=device)
        with pytest.raises(CheckpointMismatchError, match=r"shares memory with .*\['a'\]"):
            await put({"a": torch.zeros(4), "b": torch.full((4,), 2.0)}, {"a": base[:4], "b": base[2:]}, tmp_path)
        assert base.tolist() == [1] * 6

    async def test_that_overlap_as_the_values_do(self, put: Put, device: str, tmp_path: Path) -> None:
        base, values = torch.ones(6, device=device), torch.arange(6.0)
        await put({"a": values[:4], "b": values[2:]}, {"a": base[:4], "b": base[2:]}, tmp_path)
        assert base.tolist() == list(range(6))

    async def test_conjugate_and_negative_views(self, put: Put, device: str, tmp_path: Path) -> None:
        saved = {
            "conj": torch.complex(torch.arange(4.0), torch.ones(4)),
            "neg": torch.arange(4.0),
            "both": torch.arange(4.0),
            "plain": torch.arange(4.0),
        }
        conj, neg, both = (torch.zeros(4, dtype=torch.complex64, device=device) for _ in range(3))
        into = {"conj": conj.conj(), "neg": neg.conj().imag, "both": both.conj().imag, "plain": torch.zeros(4)}
        assert into["neg"].is_neg()
        await put(saved, into, tmp_path)
        for name, live in into.items():
            assert live.cpu().resolve_conj().resolve_neg().tolist() == saved[name].tolist(), name
        assert conj.cpu().resolve_conj().tolist() == saved["conj"].conj().resolve_conj().tolist()

    async def test_expanded_as_the_values_are(self, put: Put, device: str, tmp_path: Path) -> None:
        if put is not restore:
            pytest.skip("a checkpoint has each element once, so what is loaded into is not expanded")
        live = torch.zeros(1, device=device)
        await put({"a": torch.full((1,), 3.0).expand(4)}, {"a": live.expand(4)}, tmp_path)
        assert live.tolist() == [3]

    async def test_of_inference_mode_inside_it(self, put: Put, device: str, tmp_path: Path) -> None:
        with torch.inference_mode():
            live, plain = torch.zeros(4, device=device), torch.zeros(4, device=device)
            await put({"a": torch.ones(4), "b": torch.ones(4)}, {"a": live, "b": plain}, tmp_path)
        assert live.tolist() == plain.tolist() == [1] * 4


@pytest.mark.parametrize("device", ["cpu", "simgpu:0"])
async def test_one_s_own_conjugate_leaf_comes_back(device: str) -> None:
    weight = torch.complex(torch.arange(4.0), torch.ones(4)).to(device)
    tree = {"w": weight, "c": weight.conj(), "i": weight.conj().imag}
    async with AsyncStager() as stager:
        staged = await stager.stage(tree)
        weight.zero_()
        await stager.restore(staged, into=tree)
    assert weight.cpu().tolist() == [complex(n, 1) for n in range(4)]


async def test_values_in_memory_that_is_written() -> None:
    first, second = torch.ones(4), torch.zeros(4)
    async with AsyncStager() as stager:
        with pytest.raises(CheckpointMismatchError, match="is the staged value of"):
            await stager.restore({"x": second, "y": first}, into={"x": first, "y": second})
    assert first.tolist() == [1] * 4


@pytest.mark.parametrize("name", ["conj", "neg"])
async def test_a_staged_view_is_not_written_to(name: str) -> None:
    """PyTorch's record_stream writes the old values of such a leaf over what the trainer has written since."""
    live = torch.full((5000,), 1 + 1j, device="simgpu:0")
    leaf = live.conj() if name == "conj" else live.conj().imag
    torch.simgpu.copy_delay(5000, 10000)  # type: ignore[attr-defined]
    async with AsyncStager() as stager:
        for round in range(3):
            await stager.stage({"leaf": leaf})
            live.fill_(7 + 7j)
            torch.simgpu.drain()  # type: ignore[attr-defined]
            assert live.cpu().tolist() == [7 + 7j] * 5000, round
            live.fill_(1 + 1j)


@pytest.mark.parametrize("name", ["conj", "neg"])
async def test_telling_the_allocator_of_a_view_enqueues_nothing(name: str) -> None:
    """It would be the old values, copied back over what the trainer writes meanwhile."""
    live = torch.full((5000,), 1 + 1j, device="simgpu:0")
    leaf = live.conj() if name == "conj" else live.conj().imag
    before, version = torch.simgpu.stats(), live._version  # type: ignore[attr-defined]
    TorchBackend().keep(leaf, torch.Stream("simgpu:0"))
    after = torch.simgpu.stats()  # type: ignore[attr-defined]
    assert (after["copies"], after["kernels"]) == (before["copies"], before["kernels"])
    assert live._version == version
