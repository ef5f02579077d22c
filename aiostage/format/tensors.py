"""Tensors of subclasses: wrappers around other tensors, jagged ones, and those with attributes over plain memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from aiostage import _private
from aiostage.format.classes import full_name, slots_of, wrapper_parts
from aiostage.format.kinds import Kind, NotCarried, Parts

__all__ = ["JAGGED", "extra_attributes", "take_subclass_apart"]

_LEFT_OUT = {"bitsandbytes.nn.modules.Params4bit": {"module"}, "bitsandbytes.nn.modules.Int8Params": {"module"}}
"""Attributes that lead back to the module of which the tensor is a parameter: code, and larger than the tensor."""


def take_subclass_apart(tensor: Any) -> tuple[str, Parts]:
    """Take a tensor apart that is neither a Tensor nor a Parameter but of a class of its own.

    Returns:
        The name of its kind, and its parts.

    Raises:
        NotCarried: If it cannot be carried.
    """
    cls = type(tensor)
    # By name: importing DTensor takes long, and some builds of PyTorch have no distributed package.
    if cls.__name__ == "DTensor":
        raise NotCarried(
            "a DTensor is one of the shards of a tensor",
            "Save it with aiostage.dcp on all ranks, or put its full_tensor() or to_local() into the state dict.",
        )
    if full_name(cls) == "torch.nested._internal.nested_tensor.NestedTensor":
        return JAGGED.name, JAGGED.take_apart(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        inner = {name: getattr(tensor, name) for name in names}
        shape = (tuple(tensor.size()), tuple(tensor.stride()))
        parts = wrapper_parts(full_name(cls), inner, context, shape)
        return "wrapper", Parts(parts.form, parts.children, extra_attributes(tensor, names))
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise NotCarried(
            "its class has __torch_dispatch__ and does not say what it is made of",
            "Give the class __tensor_flatten__ and __tensor_unflatten__, or register it with "
            "aiostage.checkpoint.register().",
        )
    # The class may override what detach() does; its elements are wanted as they lie in memory.
    with _private.without_torch_function():
        data = torch.Tensor.detach(tensor).as_subclass(torch.Tensor)
    return "subclass", Parts({"type": full_name(cls)}, {"data": data}, extra_attributes(tensor))


def extra_attributes(tensor: Any, inner: Collection[str] = ()) -> dict[str, Any]:
    """Return what hangs on a tensor of a subclass and is not made by its class.

    Args:
        tensor: A tensor of a subclass.
        inner: The names of the tensors that it is a wrapper around.
    """
    left_out = set(inner) | _LEFT_OUT.get(full_name(type(tensor)), set())
    found = {name: getattr(tensor, name) for name in slots_of(type(tensor)) if hasattr(tensor, name)} | vars(tensor)
    if inner:
        # A wrapper that is made again from its parts shows which attributes its class sets itself. They are made again
        # in a load too, and private ones with them.
        names, context = tensor.__tensor_flatten__()
        parts = {name: getattr(tensor, name) for name in names}
        made = vars(type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride()))
        left_out |= made.keys() | {name for name in found if name.startswith("_")}
    return {name: value for name, value in found.items() if name not in left_out}


def _take_jagged_apart(tensor: Any) -> Parts:
    parts = {
        "values": tensor._values,
        "offsets": tensor._offsets,
        "lengths": tensor._lengths,
        "min_seqlen": tensor._maybe_min_seqlen,
        "max_seqlen": tensor._maybe_max_seqlen,
    }
    return Parts({"dimension": tensor._ragged_idx}, parts)


def _rebuild_jagged(form: Mapping[str, Any], children: Sequence[Any]) -> Any:
    values, offsets, lengths, shortest, longest = children
    dimension = form["dimension"]
    if type(values) is not torch.Tensor or type(offsets) is not torch.Tensor or type(dimension) is not int:
        raise ValueError("a jagged tensor is made of tensors")
    _check_jagged(values, offsets, lengths, dimension)
    return torch.nested.nested_tensor_from_jagged(
        values, offsets, lengths, jagged_dim=dimension, min_seqlen=shortest, max_seqlen=longest
    )


def _check_jagged(values: torch.Tensor, offsets: torch.Tensor, lengths: Any, dimension: int) -> None:
    """Refuse rows outside of the values: kernels do not check offsets, and would read other memory."""
    if not 1 <= dimension <= values.dim() or offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError("the offsets of a jagged tensor are not offsets")
    # Without elements there is nothing to read.
    if values.is_meta or offsets.is_meta:
        return
    stop = values.shape[dimension - 1]
    ends = offsets[1:] if lengths is None else offsets[: lengths.numel()] + lengths
    if offsets.numel() and (int(offsets[0]) < 0 or bool((offsets.diff() < 0).any()) or int(offsets[-1]) > stop):
        raise ValueError("the offsets of a jagged tensor lead outside of it")
    if ends.numel() and (int(ends.max()) > stop or int(ends.min()) < 0):
        raise ValueError("the lengths of a jagged tensor lead outside of it")


JAGGED = Kind("jagged", (), _take_jagged_apart, _rebuild_jagged)
