"""What can be set on a stager, and what it reports of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from aiostage._arguments import check_flags, require_int, require_seconds
from aiostage.errors import shown
from aiostage.leaf import Path

__all__ = ["StagerStatistics", "StagingOptions"]

DtypeRule: TypeAlias = torch.dtype | Callable[[Path, torch.Tensor], torch.dtype | None]
PassthroughRule: TypeAlias = Callable[[Path, object], bool]


@dataclass(frozen=True, kw_only=True)
class StagingOptions:
    """How an :class:`~aiostage.AsyncStager` stages. Immutable; checked when built.

    Attributes:
        use_pinned_memory: Stage into page-locked memory. None: when there is an accelerator that supports it.
            True without one: :class:`~aiostage.AcceleratorUnavailableError` when the stager is built.
        use_shared_memory: Stage into memory that another process can open, with a number of descriptors that does
            not depend on the number of tensors.
        use_async_staging: Copy in worker threads and on side streams. False: copies run inline on the event loop,
            still yielding between leaves.
        use_non_blocking_copy: Enqueue all device copies at once. False: two at a time. None: when there is an
            accelerator.
            True without one: :class:`~aiostage.AcceleratorUnavailableError` when the stager is built.
        max_loop_hold: How long a staging may hold the event loop before it yields, in seconds. ``math.inf`` makes
            the walk one indivisible step.
        max_host_bytes: Budget for arenas, in bytes. A staging over the budget waits for a lease to end; one that
            can never fit raises :class:`~aiostage.HostMemoryError`, but a save of it passes through as much memory as
            there is. None: no limit.
        max_bytes_in_flight: How many bytes each staging may have devices copy at once, so that staging leaves the next
            step some of the bus. None: no limit. A single copy of at most 32 MiB may be larger.
        low_priority_copies: Copy on streams of low priority, so that kernels of the next step go first.
        dtype: Cast floating-point leaves while they are copied: one dtype for all, or a function of path and
            tensor that returns the dtype, or None to leave the leaf as it is. The scales of quantized tensors, and
            what the ``__deepcopy__`` of an object has copied, keep their dtype.
        passthrough: A function of path and object; subtrees for which it returns True are put into the staged tree
            uncopied.
        detect_torn: Compare tensor versions and container contents when captured, and raise
            :class:`~aiostage.TornSnapshotError` if the source changed on the way.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a number is out of range, or ``dtype`` is not a floating-point dtype.
    """

    use_pinned_memory: bool | None = None
    use_shared_memory: bool = False
    use_async_staging: bool = True
    use_non_blocking_copy: bool | None = None
    max_loop_hold: float = 0.001
    max_host_bytes: int | None = None
    max_bytes_in_flight: int | None = None
    low_priority_copies: bool = True
    dtype: DtypeRule | None = None
    passthrough: PassthroughRule | None = None
    detect_torn: bool = True

    def __post_init__(self) -> None:
        """Check every field against its type and range."""
        plain = ("use_shared_memory", "use_async_staging", "low_priority_copies", "detect_torn")
        or_none = ("use_pinned_memory", "use_non_blocking_copy")
        flags = {name: getattr(self, name) for name in plain + or_none}
        flags = {name: value for name, value in flags.items() if value is not None or name in plain}
        check_flags(**flags)
        for name, value in flags.items():
            object.__setattr__(self, name, bool(value))
        hold = require_seconds("max_loop_hold", self.max_loop_hold, infinite=True, hint=" (math.inf for no yielding)")
        object.__setattr__(self, "max_loop_hold", hold)
        for name in ("max_host_bytes", "max_bytes_in_flight"):
            if getattr(self, name) is not None:
                number = require_int(name, getattr(self, name), least=1, hint=" (bytes; None for no limit)")
                object.__setattr__(self, name, number)
        if isinstance(self.dtype, torch.dtype):
            if not self.dtype.is_floating_point:
                raise ValueError(
                    f"dtype casts floating-point leaves and must be a floating-point dtype, not {self.dtype}"
                )
        elif self.dtype is not None and (isinstance(self.dtype, type) or not callable(self.dtype)):
            # Classes such as int and numpy.float32 can be called too, but are meant as dtypes.
            raise TypeError(
                f"dtype must be a torch.dtype, a function of path and tensor, or None, not {shown(self.dtype)}"
            )
        if self.passthrough is not None and not callable(self.passthrough):
            raise TypeError(f"passthrough must be a function of path and object or None, not {shown(self.passthrough)}")

    @classmethod
    def from_torch(cls, config: Any, **changes: Any) -> StagingOptions:
        """Take over the settings of one of PyTorch's own stagers.

        Args:
            config: ``torch.distributed.checkpoint.staging.StagingOptions`` or
                ``torch.distributed.checkpoint._experimental.staging.CheckpointStagerConfig``; anything with their
                four ``use_*`` fields will do.
            **changes: Fields of :class:`StagingOptions` that replace or add to the ones taken over.

        Returns:
            The same settings as :class:`StagingOptions`.

        Raises:
            TypeError: If ``config`` lacks one of the four fields.
        """
        names = ("use_pinned_memory", "use_shared_memory", "use_async_staging", "use_non_blocking_copy")
        missing = [name for name in names if not hasattr(config, name)]
        if missing:
            raise TypeError(
                f"from_torch takes PyTorch's StagingOptions or CheckpointStagerConfig; "
                f"{type(config).__qualname__} has no {', '.join(missing)}"
            )
        return cls(**({name: getattr(config, name) for name in names} | changes))


@dataclass(frozen=True, kw_only=True, slots=True)
class StagerStatistics:
    """What a stager has done and what it holds, at one moment.

    Attributes:
        stagings: Stagings captured so far.
        leaves: Leaves staged so far.
        nbytes: Bytes staged so far.
        plans_compiled: Layouts computed, one for each structure first seen.
        plans_replayed: Stagings that reused a layout.
        copies: Fused copy operations issued to worker threads and devices.
        launches: Operations enqueued on devices, packing included.
        arenas: Host allocations held now, leased or free.
        leases: Arenas that staged tensors refer to now.
        waiting: Stagings that wait for the budget now.
        pageable_bytes: Bytes of ordinary memory in arenas now.
        shared_bytes: Bytes of shared memory in arenas now.
        pinned_bytes: Bytes registered with the accelerator now; they count as pageable or shared as well.
        longest_loop_hold: The most CPU time that the event loop's thread spent on one slice of work, in seconds.
        longest_loop_hold_elapsed: The longest that one slice of work took by the clock, in seconds; it counts also
            when the system had the thread wait for a core, or another thread had the GIL.
    """

    stagings: int
    leaves: int
    nbytes: int
    plans_compiled: int
    plans_replayed: int
    copies: int
    launches: int
    arenas: int
    leases: int
    waiting: int
    pageable_bytes: int
    shared_bytes: int
    pinned_bytes: int
    longest_loop_hold: float
    longest_loop_hold_elapsed: float
