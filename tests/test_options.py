from __future__ import annotations

import dataclasses
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint._experimental.staging import CheckpointStagerConfig
from torch.distributed.checkpoint.staging import StagingOptions as TorchStagingOptions

from aiostage import AcceleratorUnavailableError, AsyncStager, StagingOptions
from aiostage.testing import SimulatedAccelerator


def test_defaults_are_what_the_machine_can_do() -> None:
    options = StagingOptions()
    assert (options.use_pinned_memory, options.use_non_blocking_copy) == (None, None)
    assert (options.use_async_staging, options.use_shared_memory, options.detect_torn) == (True, False, True)
    assert options.max_loop_hold == 0.001
    AsyncStager(options)


def test_flags_and_numbers_of_numpy_become_those_of_python() -> None:
    values: Any = {"use_pinned_memory": np.False_, "detect_torn": np.True_, "max_host_bytes": np.int64(1 << 30)}
    options = StagingOptions(**values)
    assert options.use_pinned_memory is False
    assert options.detect_torn is True
    assert type(options.max_host_bytes) is int
    assert options == StagingOptions(use_pinned_memory=False, max_host_bytes=1 << 30)
    with pytest.raises(ValueError, match=r"of at least 1 \(bytes; None for no limit\), not -1$"):
        StagingOptions(max_host_bytes=np.int64(-1))


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        StagingOptions().max_loop_hold = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        StagingOptions(True)  # type: ignore[misc]
    assert StagingOptions() == StagingOptions()
    assert hash(StagingOptions()) == hash(StagingOptions())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"use_shared_memory": None}, TypeError, "use_shared_memory must be True or False, not None"),
        ({"use_async_staging": 1}, TypeError, "use_async_staging must be True or False, not 1"),
        ({"low_priority_copies": "no"}, TypeError, "low_priority_copies must be True or False, not 'no'"),
        ({"detect_torn": 0}, TypeError, "detect_torn must be True or False, not 0"),
        ({"use_pinned_memory": 1}, TypeError, "use_pinned_memory must be True or False, not 1"),
        ({"use_non_blocking_copy": "yes"}, TypeError, "use_non_blocking_copy must be True or False, not 'yes'"),
        (
            {"max_loop_hold": "1"},
            TypeError,
            r"max_loop_hold must be a number of seconds \(math.inf .*\), not '1'",
        ),
        ({"max_loop_hold": 10**400}, ValueError, r"max_loop_hold must be .* above 0 \(math.inf for no yielding\), not"),
        ({"max_loop_hold": True}, TypeError, "max_loop_hold must be a number of seconds .*, not True"),
        ({"max_loop_hold": 0}, ValueError, "above 0 .*, not 0"),
        ({"max_loop_hold": -1.0}, ValueError, "above 0 .*, not -1.0"),
        ({"max_loop_hold": math.nan}, ValueError, "above 0 .*, not nan"),
        ({"max_host_bytes": 0}, ValueError, "max_host_bytes must be an integer of at least 1 .*, not 0"),
        ({"max_host_bytes": -5}, ValueError, "max_host_bytes must be an integer of at least 1 .*, not -5"),
        (
            {"max_host_bytes": 1e9},
            TypeError,
            r"max_host_bytes must be an integer \(bytes; None for no limit\), not 1000000000.0",
        ),
        ({"max_host_bytes": True}, TypeError, r"max_host_bytes must be an integer \(.*, not True"),
        ({"max_bytes_in_flight": 0}, ValueError, "max_bytes_in_flight must be an integer of at least 1 .*, not 0"),
        (
            {"max_bytes_in_flight": "1"},
            TypeError,
            r"max_bytes_in_flight must be an integer \(bytes; None for no limit\), not '1'",
        ),
        ({"dtype": torch.int8}, ValueError, "floating-point dtype, not torch.int8"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be a torch.dtype, a function .*, not 'bfloat16'"),
        ({"dtype": int}, TypeError, "dtype must be a torch.dtype, a function .*, not the class int"),
        ({"passthrough": ["model"]}, TypeError, r"passthrough must be a function .*, not list of 1"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_with_its_value(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        StagingOptions(**changes)


@pytest.mark.parametrize("seconds", [1e-9, 1, math.inf])
def test_any_time_above_nothing(seconds: float) -> None:
    assert StagingOptions(max_loop_hold=seconds).max_loop_hold == seconds


@pytest.mark.parametrize("seconds", [np.float32(0.5), Fraction(1, 2), Decimal("0.5")], ids=repr)
def test_a_time_of_any_class_becomes_a_float(seconds: Any) -> None:
    hold = StagingOptions(max_loop_hold=seconds).max_loop_hold
    assert (type(hold), hold) == (float, 0.5)


@pytest.mark.parametrize("seconds", [Decimal("sNaN"), Decimal("nan"), np.float32("nan"), np.float64(0)], ids=repr)
def test_a_time_that_is_none(seconds: Any) -> None:
    # The value is shown, whatever its class.
    with pytest.raises(ValueError, match=r"max_loop_hold must be a number of seconds above 0 .*, not (nan|0\.0)$"):
        StagingOptions(max_loop_hold=seconds)


class TestFromTorch:
    @pytest.mark.parametrize("make", [TorchStagingOptions, CheckpointStagerConfig])
    def test_takes_all_four(self, make: type) -> None:
        ours = StagingOptions.from_torch(
            make(use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False)
        )
        assert ours == StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )

    def test_changes_come_on_top(self) -> None:
        theirs = TorchStagingOptions(True, True, True, True)
        ours = StagingOptions.from_torch(theirs, use_pinned_memory=None, max_host_bytes=2**30)
        assert (ours.use_pinned_memory, ours.use_shared_memory, ours.max_host_bytes) == (None, True, 2**30)

    def test_something_else_is_refused_with_what_it_lacks(self) -> None:
        with pytest.raises(TypeError, match="dict has no use_pinned_memory, use_shared_memory"):
            StagingOptions.from_torch({})
        with pytest.raises(TypeError, match="unexpected keyword argument 'pinned'"):
            StagingOptions.from_torch(TorchStagingOptions(False, False, False, False), pinned=True)


@pytest.mark.parametrize("name", ["use_pinned_memory", "use_non_blocking_copy"])
def test_what_cannot_be_met_is_refused_when_the_stager_is_built(name: str) -> None:
    with SimulatedAccelerator() as accelerator:
        AsyncStager(StagingOptions(**{name: True}), backend=accelerator)
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(AcceleratorUnavailableError, match=rf"{name}=True cannot be met: .+\. Set {name}=None"):
        AsyncStager(StagingOptions(**{name: True}))


def test_a_stager_takes_no_other_options() -> None:
    with pytest.raises(TypeError, match=r"not dict of 1.*from_torch"):
        AsyncStager({"use_shared_memory": True})  # type: ignore[arg-type]
