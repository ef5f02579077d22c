"""What to do about an object that a checkpoint cannot carry."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import numpy as np
import torch

__all__ = ["remedy_for"]


def remedy_for(value: Any) -> str:
    """Return what to put into the state dict instead of an object of a class that has no place in a manifest."""
    # By name: importing DTensor takes a second, and whoever has one has imported it.
    if type(value).__name__ == "DTensor":
        return "Save it with aiostage.dcp on all ranks, or put its full_tensor() or to_local() into the state dict."
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            return "Put the inner tensors into the state dict that its __tensor_flatten__ names."
        return "Put its as_subclass(torch.Tensor) into the state dict."
    if isinstance(value, torch.Generator):
        return "Put its get_state() into the state dict."
    if isinstance(value, enum.Enum):
        return "Put its name or its value into the state dict."
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "Put its vars() into the state dict."
    if isinstance(value, torch.UntypedStorage | torch.TypedStorage):
        return "Put a tensor over it into the state dict."
    for cls in (dict, list, tuple, set, frozenset, bool, int, float, complex, str, bytes):
        # Subclasses only: of these classes themselves nothing is refused.
        if isinstance(value, cls):
            return f"Convert it by {cls.__name__}()."
    if isinstance(value, np.ndarray):
        return "Convert it to an array of a number type in the byte order of this machine, or by tolist()."
    if isinstance(value, np.generic):
        return "Convert it by float() or str()."
    if hasattr(value, "state_dict"):
        return "Put its state_dict() into the state dict."
    return "Put what it is made of into the state dict: tensors, numbers, strings and plain containers."
