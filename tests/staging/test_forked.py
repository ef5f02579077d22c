"""Stagers and storages that were in use when the process was forked, as DataLoader does it, in child and parent."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forking import run_forking

pytestmark = pytest.mark.slow

STAGER = """
import torch
from aiostage import AsyncStager, StagingOptions

state = {str(n): torch.full((1 << 18,), float(n)) for n in range(8)}

async def main(options):
    async with AsyncStager(options) as stager:
        first = await stager.stage(state)
        await stager.stage(state)

        def child():
            # As DataLoader does: OpenMP hangs where the parent's same thread has used more.
            torch.set_num_threads(1)

            async def use():
                async with stager:
                    for _ in range(2):
                        staged = await stager.stage({name: -tensor for name, tensor in state.items()})
                    assert all(bool((staged[name] == -tensor).all()) for name, tensor in state.items())
                    assert stager.statistics().leases == 1

            asyncio.run(use())
            assert all(bool((first[name] == tensor).all()) for name, tensor in state.items())

        for turns in (0, 6):
            # Beside a staging that has come so far.
            staging = asyncio.ensure_future(stager.stage(state))
            for _ in range(turns):
                await asyncio.sleep(0)
            # From a thread, as the child of the loop's own would have the loop on its stack.
            forking = asyncio.ensure_future(asyncio.to_thread(in_child, child))
            staged = await staging
            await forking
            for tree in (first, staged):
                assert all(bool((tree[name] == tensor).all()) for name, tensor in state.items())
        in_child(child)
        assert repr(stager)

for shared in (False, True):
    asyncio.run(main(StagingOptions(use_shared_memory=shared)))
"""


def test_a_stager_works_in_the_child_and_beside_it() -> None:
    run_forking(STAGER)


LOADING = """
import warnings, torch
import aiostage
from aiostage.storage import LocalStorage
from torch.utils.data import DataLoader, Dataset

# On a machine with one core it warns of two workers.
warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)

async def main(root):
    storage = LocalStorage(root)
    stager = aiostage.AsyncStager()
    for number in range(4):
        await aiostage.save({"sample": torch.full((300_000,), float(number))}, (storage, str(number)), stager=stager)

    class Samples(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            async def get():
                loaded = await aiostage.load((storage, str(index)))
                staged = await stager.stage(loaded)
                await aiostage.save(staged, (storage, f"of-child-{index}"), stager=stager)
                return staged["sample"][:3].clone()

            return asyncio.run(get())

    def read():
        loader = DataLoader(Samples(), num_workers=2, batch_size=None, multiprocessing_context="fork")
        return [sample.tolist() for sample in loader]

    saving = asyncio.ensure_future(aiostage.save({"a": torch.ones(3_000_000)}, (storage, "more"), stager=stager))
    assert await asyncio.to_thread(read) == [[float(number)] * 3 for number in range(4)]
    await saving
    assert len(await storage.list()) == 9
    assert float((await aiostage.load((storage, "more")))["a"].sum()) == 3_000_000
    await stager.aclose()

asyncio.run(main("ROOT"))
"""


def test_the_workers_of_a_data_loader_load_and_save_through_what_they_inherit(tmp_path: Path) -> None:
    run_forking(LOADING.replace("ROOT", str(tmp_path)))
