"""Models and optimizers of which a process has only a part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from aiostage import UnsupportedLeafError
from aiostage.integrations._ranks import refuse_partitioned, refuse_sharded


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_whole_ones_are_taken() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    refuse_sharded(model, model.state_dict(), "model")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refuse_partitioned(optimizer, "optimizer")
    refuse_partitioned(None, "optimizer")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_module_of_fsdp_1(group: None) -> None:
    model = torch.nn.Sequential(FullyShardedDataParallel(torch.nn.Linear(2, 2), device_id=torch.device("cpu")))
    with pytest.raises(UnsupportedLeafError, match=r"\['model'\]\['0'\].*FullyShardedDataParallel"):
        refuse_sharded(model, model.state_dict(), "model")


def test_a_parameter_of_zero_3() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    # As deepspeed.zero.Init leaves them: empty, with what leads to the partitions as attributes.
    for number, parameter in enumerate(model.parameters()):
        parameter.data = torch.empty(0)
        parameter.ds_id = number  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedLeafError, match=r"\['model'\]\['0\.weight'\].*ZeRO 3"):
        refuse_sharded(model, model.state_dict(), "model")


def test_an_optimizer_of_deepspeed() -> None:
    kind = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    wrapper = type("Wrapper", (), {})()
    wrapper.optimizer = kind()
    with pytest.raises(UnsupportedLeafError, match=r"optimizer.*DeepSpeed"):
        refuse_partitioned(wrapper, "optimizer")
