"""Accelerators: how staging reaches them, and how copies follow the caller's work."""

from __future__ import annotations

import torch

from aiostage._device.accelerator import TorchBackend
from aiostage._device.cuda import CudaBackend
from aiostage._device.streams import CallerStreams, CopyStreams, device_errors
from aiostage.abc import Backend
from aiostage.errors import shown

__all__ = [
    "CallerStreams",
    "CopyStreams",
    "CudaBackend",
    "TorchBackend",
    "checked_backend",
    "default_backend",
    "device_errors",
]


def default_backend() -> TorchBackend:
    """Return the backend of the accelerator that this build of PyTorch was made for. Touches no device."""
    accelerator = torch.accelerator.current_accelerator()
    return CudaBackend() if accelerator is not None and accelerator.type == "cuda" else TorchBackend()


def checked_backend(backend: Backend | None) -> Backend:
    """Return what was given as ``backend=``, or the default one.

    Raises:
        TypeError: If it is neither a :class:`~aiostage.Backend` nor None.
    """
    if backend is not None and not isinstance(backend, Backend):
        raise TypeError(f"backend must be an aiostage.Backend, or None for torch.accelerator, not {shown(backend)}")
    return backend if backend is not None else default_backend()
