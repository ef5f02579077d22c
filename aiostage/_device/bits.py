"""Tensors whose memory is not their value: conjugate and negative views, whose bit PyTorch applies when it reads.

PyTorch carries out an in-place operator on such a tensor by cloning it, changing the clone and copying that back. For
``record_stream`` this writes old values over what the trainer has written meanwhile, and corrupts the heap (2.13 and
2.14.1); a fused copy refuses it. So nothing here calls an in-place operator on a tensor with one of the bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["plain_alias", "without_bits", "writing_to"]


def plain_alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory without the conjugate and the negative bit; itself if it has neither."""
    if not (tensor.is_conj() or tensor.is_neg()):
        return tensor
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def without_bits(destination: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a plain destination over the same memory, and a plain source that copied there gives the same values.

    Args:
        destination: A tensor, or a conjugate or negative view.
        source: A tensor of the same shape. Bits that have to be flipped are computed on its device and the current
            stream.
    """
    if not (destination.is_conj() or destination.is_neg() or source.is_conj() or source.is_neg()):
        return destination, source
    value = source.detach()
    if destination.is_conj():
        value = value.conj()
    if destination.is_neg():
        value = -value
    # Not left to the copy: PyTorch copies the memory and then, without waiting for it, flips what has not arrived yet.
    value = value.resolve_conj().resolve_neg()
    return plain_alias(destination), value


@contextmanager
def writing_to(destinations: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let leaves that require gradients be written to, and tensors that were made in inference mode."""
    # Both modes belong to the thread. What may be written to was decided where the caller asked for it.
    inference = any(map(torch.Tensor.is_inference, destinations))
    with torch.inference_mode() if inference else torch.no_grad():
        yield
