"""Accelerators: how staging reaches them, and how copies follow the caller's work."""

from __future__ import annotations

import torch

from aiostage._device.accelerator import TorchBackend
from aiostage._device.cuda import CudaBackend
from aiostage._device.streams import CallerStreams, CopyStreams, device_errors

__all__ = ["CallerStreams", "CopyStreams", "CudaBackend", "TorchBackend", "default_backend", "device_errors"]


def default_backend() -> TorchBackend:
    """Return the backend of the accelerator that this build of PyTorch was made for. Touches no device."""
    accelerator = torch.accelerator.current_accelerator()
    return CudaBackend() if accelerator is not None and accelerator.type == "cuda" else TorchBackend()
