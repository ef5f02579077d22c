"""Memory that is looked for before it is read."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from aiostage._capture.versions import Sources


def test_fewer_bytes_at_the_same_address_are_lost() -> None:
    for _ in range(100_000):
        tensor = torch.ones(100)
        storage, address = tensor.untyped_storage(), tensor.data_ptr()
        leaves = SimpleNamespace(tensors=[tensor], storages=[storage], storage_sizes=[400], addresses=[address])
        sources = Sources(leaves, [None])  # type: ignore[arg-type]
        assert sources.are_there([0]) is None
        storage.resize_(0)
        storage.resize_(396)
        if storage.data_ptr() == address:
            break
    else:
        raise AssertionError("the allocator never handed out the same address")
    assert sources.are_there([0]) == [False]
    assert sources.are_there(range(1)) == [False]
    assert sources.lost == {0}
