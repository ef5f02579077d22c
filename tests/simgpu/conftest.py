"""Tests in this folder run on the PyTorch device of `aiostage.testing.simgpu`, in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def has_device() -> bool:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == "simgpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if has_device():
        return
    for item in items:
        if "tests/simgpu/" in item.nodeid:
            reason = "PyTorch was not started with the simulated device: `make test-simgpu` does that"
            item.add_marker(pytest.mark.skipif(True, reason=reason))


@pytest.fixture(autouse=True)
def _device_as_it_was() -> Iterator[None]:
    """Give every test a device without delays and failures, and find out that nothing read freed memory."""
    yield
    if not has_device():
        return
    device = torch.simgpu  # type: ignore[attr-defined]
    device.fail_device(False)
    device.sync_watch(0)
    device.copy_delay(0, 0)
    device.kernel_delay(0, 0)
    device.drain()
