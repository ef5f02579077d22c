"""Whether a loaded tree is the one that was saved: classes, order, identities, ties, strides and every bit."""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, defaultdict, deque
from itertools import combinations
from typing import Any

import numpy as np
import torch

CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
MAPPINGS = (dict, OrderedDict, Counter, defaultdict)
SEQUENCES = (list, tuple, deque)
SETS = (set, frozenset)


def data_of(tensor: torch.Tensor) -> bytes:
    """Return the elements of a strided tensor in index order."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    carrier = torch.empty(0, dtype=CARRIERS[tensor.element_size()])
    carrier.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return bytes(carrier.contiguous().numpy().tobytes())


def assert_same(saved: Any, loaded: Any) -> None:
    """Compare two trees completely."""
    comparison = _Comparison()
    comparison.compare("tree", saved, loaded)
    comparison.compare_ties()


class _Comparison:
    def __init__(self) -> None:
        self.loaded_of: dict[int, Any] = {}
        self.saved_of: dict[int, Any] = {}
        self.tensors: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def is_new(self, at: str, saved: Any, loaded: Any) -> bool:
        """Compare the identities of two objects that may be met more than once."""
        if id(saved) in self.loaded_of or id(loaded) in self.saved_of:
            assert self.loaded_of.get(id(saved)) is loaded, f"{at} is shared in one tree only"
            assert self.saved_of.get(id(loaded)) is saved, f"{at} is shared in one tree only"
            return False
        self.loaded_of[id(saved)], self.saved_of[id(loaded)] = loaded, saved
        return True

    def compare(self, at: str, saved: Any, loaded: Any) -> None:
        assert type(saved) is type(loaded), f"{at}: {type(loaded)} for {type(saved)}"
        if isinstance(saved, torch.Tensor):
            if self.is_new(at, saved, loaded):
                self.compare_tensors(at, saved, loaded)
        elif isinstance(saved, MAPPINGS):
            if self.is_new(at, saved, loaded):
                assert getattr(saved, "default_factory", None) is getattr(loaded, "default_factory", None)
                self.compare_items(at, list(saved.items()), list(loaded.items()))
        elif isinstance(saved, SEQUENCES):
            # The empty tuple is one object.
            if saved == () or self.is_new(at, saved, loaded):
                assert getattr(saved, "maxlen", None) == getattr(loaded, "maxlen", None)
                self.compare_items(at, list(enumerate(saved)), list(enumerate(loaded)))
        elif isinstance(saved, np.ndarray):
            assert (saved.dtype, saved.shape, saved.tobytes()) == (loaded.dtype, loaded.shape, loaded.tobytes()), at
        elif isinstance(saved, float):
            assert struct.pack(">d", saved) == struct.pack(">d", loaded), at
        elif isinstance(saved, complex):
            assert struct.pack(">2d", saved.real, saved.imag) == struct.pack(">2d", loaded.real, loaded.imag), at
        elif isinstance(saved, np.generic):
            assert saved.tobytes() == loaded.tobytes(), at
        elif isinstance(saved, SETS):
            assert sorted(map(repr, saved)) == sorted(map(repr, loaded)), at
        else:
            assert saved == loaded, at

    def compare_items(self, at: str, saved: list[tuple[Any, Any]], loaded: list[tuple[Any, Any]]) -> None:
        assert len(saved) == len(loaded), at
        for (key, value), (loaded_key, loaded_value) in zip(saved, loaded, strict=True):
            here = f"{at}[{key!r}]"
            self.compare(f"key {here}", key, loaded_key)
            self.compare(here, value, loaded_value)

    def compare_tensors(self, at: str, saved: torch.Tensor, loaded: torch.Tensor) -> None:
        assert (saved.dtype, saved.shape, saved.layout) == (loaded.dtype, loaded.shape, loaded.layout), at
        assert loaded.device.type == "cpu", at
        assert loaded.requires_grad == (saved.requires_grad and saved.is_leaf), at
        assert not loaded.is_conj(), at
        assert not loaded.is_neg(), at
        self.compare(f"{at}.__dict__", vars(saved), vars(loaded))
        if saved.layout is torch.sparse_coo:
            assert saved.is_coalesced() == loaded.is_coalesced(), at
            self.compare(f"{at}.indices", saved._indices(), loaded._indices())
            self.compare(f"{at}.values", saved._values(), loaded._values())
        elif saved.is_quantized:
            assert saved.qscheme() == loaded.qscheme(), at
            assert torch.equal(saved.int_repr(), loaded.int_repr()), at
            assert torch.equal(saved.dequantize(), loaded.dequantize()), at
        elif saved.layout is not torch.strided:
            assert torch.equal(saved.to_dense(), loaded.to_dense()), at
        else:
            assert data_of(saved) == data_of(loaded), at
            if not (saved.is_conj() or saved.is_neg()):
                assert significant_strides(saved) == significant_strides(loaded), at
                self.tensors.append((at, saved, loaded))

    def compare_ties(self) -> None:
        """Compare which tensors share memory, and in which way."""
        for (at, saved, loaded), (other_at, other_saved, other_loaded) in combinations(self.tensors, 2):
            where = f"{at} and {other_at}"
            if overlap(saved, other_saved):
                assert loaded.untyped_storage().data_ptr() == other_loaded.untyped_storage().data_ptr(), where
                distance = other_saved.data_ptr() - saved.data_ptr()
                assert other_loaded.data_ptr() - loaded.data_ptr() == distance, where
            else:
                assert not overlap(loaded, other_loaded), where


def significant_strides(tensor: torch.Tensor) -> list[int]:
    """Return the strides that decide where elements are."""
    if tensor.numel() == 0:
        return []
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether the memory that two tensors span has a byte in common."""
    (start, stop), (other_start, other_stop) = span(first), span(second)
    return start < other_stop and other_start < stop


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first address of a tensor's elements, and the one past the last."""
    if tensor.numel() == 0:
        return 0, 0
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()
