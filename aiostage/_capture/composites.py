"""Tensors that are not one piece of memory: taken apart into tensors that are, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from aiostage import _private
from aiostage._capture.faithful import PLAIN_CLASSES, WITHOUT_QUANTIZER, Refusal
from aiostage._warnings import without_warnings
from aiostage.format.composites import inner_tensors, quantized_over

__all__ = ["Composite", "composite_of", "finder", "traits_of"]


@dataclass(frozen=True, slots=True)
class Composite:
    """A tensor that is taken apart into others and put together again.

    Attributes:
        parts: The tensors inside, leaves in their own right.
        find_parts: Returns the tensors that are inside now.
        assemble: Makes the staged tensor from the staged parts.
        traits: The class, and whether it requires a gradient.
        owned: Names of attributes that ``assemble`` sets. None: it sets none.
    """

    parts: tuple[torch.Tensor, ...]
    find_parts: Callable[[], tuple[torch.Tensor, ...]]
    assemble: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    traits: tuple[type, bool]
    owned: frozenset[str] | None = None

    def owns(self, name: str) -> bool:
        """Return whether an attribute is set by ``assemble``, or a cache of the class; others are copied."""
        # The marks of parameters and buffers are set from outside.
        is_private = name.startswith("_") and not name.startswith("_is_")
        return self.owned is not None and (name in self.owned or is_private)


def composite_of(tensor: torch.Tensor, meaning: str | Refusal) -> Composite | None:
    """Take a tensor apart that is not one piece of memory.

    Args:
        tensor: A tensor of any class and layout.
        meaning: What its dispatch keys say, from :meth:`SpecTable.meanings`.

    Returns:
        Its parts, or None if it is one piece of memory.

    Raises:
        Refusal: If it can neither be copied nor taken apart faithfully.
    """
    cls = type(tensor)
    if cls not in PLAIN_CLASSES:
        if isinstance(tensor, UninitializedTensorMixin):
            return _uninitialized(tensor)
        _refuse_by_class(tensor)
        if _private.is_wrapper(tensor):
            return _wrapper(tensor)
    # After the classes: a wrapper's own dispatch keys say that it cannot be copied, and its parts can.
    if isinstance(meaning, Refusal):
        raise meaning
    if meaning == "sparse":
        return _sparse(tensor)
    if meaning == "sparse_compressed":
        return _sparse_compressed(tensor)
    if meaning == "quantized":
        return _quantized(tensor)
    return None


def _refuse_by_class(tensor: torch.Tensor) -> None:
    name = type(tensor).__name__
    if name == "FakeTensor":
        raise Refusal("it is a FakeTensor and has no data.", "Stage the real tensors, outside FakeTensorMode.")
    if name == "ShardedTensor":
        raise Refusal("ShardedTensor is not supported.", "Use DTensor, or stage its local_shards().")
    if name == "DTensor" and any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
        raise Refusal(
            f"it is a DTensor with partial placements {tensor.placements}, whose local tensors are not its value.",  # type: ignore[attr-defined]
            "Redistribute it to Shard or Replicate placements first.",
        )


def traits_of(tensor: torch.Tensor) -> tuple[type, bool]:
    """Return what a tensor that is rebuilt from parts has besides: its class, and whether it requires a gradient."""
    return type(tensor), tensor.requires_grad and tensor.is_leaf


def _finished(result: torch.Tensor, traits: tuple[type, bool]) -> torch.Tensor:
    """Give a rebuilt tensor the traits of its source, as they were when that was taken apart."""
    cls, requires_grad = traits
    if requires_grad and not result.requires_grad:
        result.requires_grad_()
    if cls is torch.nn.Parameter and type(result) is torch.Tensor:
        result = torch.nn.Parameter(result, requires_grad=requires_grad)
    return result


_owned_by_class: dict[type, frozenset[str]] = {}
"""The attributes that ``assemble`` sets, for classes of which that is so for each tensor."""


def _wrapper(tensor: Any) -> Composite:
    attributes, context = tensor.__tensor_flatten__()
    inner = {name: getattr(tensor, name) for name in attributes}
    # Some name what is not a tensor too. A DTensor's mesh stands for connections and stays the one that it is.
    names = [name for name, value in inner.items() if isinstance(value, torch.Tensor)]
    parts = tuple(inner[name] for name in names)
    kept = {name: value for name, value in inner.items() if name not in names}
    cls, size, stride, traits = type(tensor), tensor.size(), tensor.stride(), traits_of(tensor)

    ragged = None
    if tensor.layout is torch.jagged:
        ragged = "_lengths" if "_lengths" in names else "_offsets"

    def assemble(staged: Sequence[torch.Tensor]) -> torch.Tensor:
        made = dict(zip(names, staged, strict=True))
        # Nested tensors that had one ragged size between them have one again, or PyTorch refuses to add them.
        if ragged in made:
            _private.share_ragged_size(inner[ragged], made[ragged])
        result = cls.__tensor_unflatten__(made | kept, context, size, stride)
        return _finished(result, traits)

    owned = _owned_by_class.get(cls)
    if owned is None:
        # Putting the source's own parts together copies nothing and shows which attributes that sets.
        with torch.no_grad():
            owned = frozenset(vars(assemble(parts)))
        # What others set may depend on what is in them. A DTensor has its own in slots, and takes 20 us to make.
        if cls.__module__ == "torch.distributed.tensor":
            _owned_by_class[cls] = owned
    return Composite(parts, lambda: tuple(getattr(tensor, name) for name in names), assemble, traits, owned)


# A file has the same parts, and puts them together by itself: what it says of them is text, and not to be trusted.
# Wrappers differ: a file keeps what is inside them as nodes of its tree, and its own list of classes.
def finder(tensor: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return what finds the tensors inside one, and raises ValueError once that is of another kind."""
    layout, names = tensor.layout, list(inner_tensors(tensor) or ())

    def find_parts() -> tuple[torch.Tensor, ...]:
        found = inner_tensors(tensor) or {}
        if tensor.layout is not layout or list(found) != names:
            raise ValueError("its kind has changed meanwhile")
        return tuple(found.values())

    return find_parts


def _sparse(tensor: torch.Tensor) -> Composite:
    # Read now and not when it is put together: by then the source may be another.
    size, coalesced, traits = tensor.size(), tensor.is_coalesced(), traits_of(tensor)

    def assemble(staged: Sequence[torch.Tensor]) -> torch.Tensor:
        # The first in a process lets PyTorch 2.11 warn that nothing is checked, although that was asked for.
        with without_warnings():
            result = torch.sparse_coo_tensor(
                staged[0], staged[1], size, is_coalesced=coalesced, check_invariants=False, device="cpu"
            )
        return _finished(result, traits)

    try:
        find_parts = finder(tensor)
    except ValueError as error:
        raise Refusal(f"{error}.", "Coalesce it.") from None
    return Composite(find_parts(), find_parts, assemble, traits)


def _sparse_compressed(tensor: torch.Tensor) -> Composite:
    size, layout, traits = tensor.size(), tensor.layout, traits_of(tensor)

    find_parts = finder(tensor)

    def assemble(staged: Sequence[torch.Tensor]) -> torch.Tensor:
        # The layout warns that it is in beta; PyTorch has warned the code that made the source.
        with without_warnings():
            result = torch.sparse_compressed_tensor(
                staged[0], staged[1], staged[2], size, layout=layout, check_invariants=False, device="cpu"
            )
        return _finished(result, traits)

    return Composite(find_parts(), find_parts, assemble, traits)


def _quantized(tensor: torch.Tensor) -> Composite:
    if _private.rebuild_qtensor is None:
        raise Refusal("it is quantized, and this PyTorch cannot rebuild it.", "Stage its dequantize().")
    if _private.cdata is None:
        raise Refusal(
            "it is quantized, and this PyTorch does not tell whether it has a quantizer.", "Stage its dequantize()."
        )
    if not _private.has_quantizer(tensor):
        # PyTorch dereferences the quantizer that is not there, and the process would end.
        raise Refusal(
            "it is a view of a quantized tensor by a dtype, which PyTorch can neither copy nor read.",
            "Stage the int_repr() of the quantized tensor.",
        )
    try:
        scheme = tensor.qscheme()
    except RuntimeError:
        raise Refusal(*WITHOUT_QUANTIZER) from None
    per_channel = scheme in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
    if scheme == torch.per_tensor_affine:
        affine: tuple[Any, ...] = (scheme, tensor.q_scale(), tensor.q_zero_point())
    elif per_channel:
        affine = (scheme, tensor.q_per_channel_axis())
    else:
        raise Refusal(f"its quantization scheme {scheme} is not supported.", "Dequantize it first.")
    dtype, size, stride, offset = tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset())
    traits = traits_of(tensor)

    find_parts = finder(tensor)

    def assemble(staged: Sequence[torch.Tensor]) -> torch.Tensor:
        scheme_and_parameters = affine if len(staged) == 1 else (affine[0], staged[1], staged[2], affine[1])
        with without_warnings():
            result = quantized_over(staged[0], dtype, offset, size, stride, scheme_and_parameters)
        return _finished(result, traits)

    return Composite(find_parts(), find_parts, assemble, traits)


def _uninitialized(tensor: Any) -> Composite:
    cls, requires_grad, dtype = type(tensor), tensor.requires_grad, tensor.data.dtype

    def assemble(staged: Sequence[torch.Tensor]) -> torch.Tensor:
        if issubclass(cls, torch.nn.Parameter):
            return cls(requires_grad, device="cpu", dtype=dtype)  # type: ignore[call-arg]
        return cls(requires_grad=requires_grad, device="cpu", dtype=dtype)  # type: ignore[no-any-return]

    return Composite((), lambda: (), assemble, traits_of(tensor))
