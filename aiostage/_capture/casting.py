"""Which dtype each leaf is staged in, where the options ask for another than its own."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import cache

import torch

from aiostage import _private
from aiostage._capture.faithful import Spec, SpecTable
from aiostage._capture.leaves import Leaves
from aiostage.errors import UnsupportedLeafError, shown
from aiostage.leaf import Path, format_path

__all__ = ["cast_specs"]


def cast_specs(
    leaves: Leaves,
    table: SpecTable,
    rule: torch.dtype | Callable[[Path, torch.Tensor], torch.dtype | None],
    path_of: Callable[[int], Path],
) -> Generator[None, None, list[Spec | None]]:
    """Return the specs of leaves with the dtypes that the options ask for, yielding between small steps.

    Args:
        leaves: Inspected.
        table: Interns the specs.
        rule: The dtype for every leaf with floating-point values, or what returns it, or None to keep a leaf's own.
        path_of: Returns the path of a leaf.

    Raises:
        UnsupportedLeafError: If PyTorch cannot cast a leaf so, or a gradient would have another dtype than its tensor.
        TypeError: If the rule returns something else.
    """
    specs: list[Spec | None] = []
    for index, spec in enumerate(leaves.specs):
        if spec is not None and spec.dtype.is_floating_point and _is_value(leaves, index, spec.dtype):
            target = rule if isinstance(rule, torch.dtype) else _asked(rule, path_of(index), leaves.tensors[index])
            if target is not None and target is not spec.dtype:
                if not _can_cast(spec.dtype, target):
                    raise UnsupportedLeafError(
                        f"PyTorch cannot cast {spec.dtype} to {target}.",
                        path=format_path(path_of(index)),
                        remedy="Return None for it from the dtype function.",
                    )
                spec = table.cast(spec, target)
        specs.append(spec)
        # A call of the user's function each, of unknown length: some dozens between two turns.
        if index % 64 == 0:
            yield
    # PyTorch lets no gradient have another dtype than its tensor.
    for index, gradient in leaves.gradients.items():
        spec, of_gradient = specs[index], specs[gradient]
        target = spec.target if spec is not None else None
        if index in leaves.given:
            target = leaves.given[index].dtype
        if gradient in leaves.given and spec is not None:
            # What code of objects has copied keeps its dtype, and what belongs to it.
            specs[index] = leaves.specs[index]
        if target is None or of_gradient is None or target is of_gradient.target:
            continue
        if leaves.owners.find(gradient) != index:
            raise UnsupportedLeafError(
                f"it is to be {of_gradient.target}, and is the gradient of a tensor that is to be {target}.",
                path=format_path(path_of(gradient)),
                remedy="Return the same dtype for both from the dtype function.",
            )
        specs[gradient] = table.cast(of_gradient, target)
    return specs


def _is_value(leaves: Leaves, index: int, dtype: torch.dtype) -> bool:
    """Return whether the elements of a leaf are values: what scales those of a quantized tensor is not."""
    owner = leaves.owners.find(index)
    if owner is None or owner not in leaves.composites or leaves.gradients.get(owner) == index:
        return True
    with _private.without_torch_function():
        return leaves.tensors[owner].dtype is dtype


def _asked(
    rule: Callable[[Path, torch.Tensor], torch.dtype | None], path: Path, tensor: torch.Tensor
) -> torch.dtype | None:
    """Return what the user's function says of a leaf."""
    target = rule(path, tensor)
    if target is not None and not (isinstance(target, torch.dtype) and target.is_floating_point):
        raise TypeError(
            f"{format_path(path)}: the dtype function must return a floating-point torch.dtype or None, "
            f"not {target if isinstance(target, torch.dtype) else shown(target)}"
        )
    return target


@cache
def _can_cast(dtype: torch.dtype, target: torch.dtype) -> bool:
    try:
        torch.empty(1, dtype=target, device="cpu").copy_(torch.empty(1, dtype=dtype, device="cpu"))
    except RuntimeError:
        return False
    return True
