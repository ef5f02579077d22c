"""The simulated device, which PyTorch loads at the end of its own import. Copied next to its library by the build."""

from __future__ import annotations

import atexit

import torch

import torch_simgpu._C
import torch_simgpu.simgpu

torch.utils.rename_privateuse1_backend("simgpu")
torch._register_device_module("simgpu", torch_simgpu.simgpu)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
# Its threads must not run Python-owned memory down with the interpreter.
atexit.register(torch_simgpu._C.stop)


def autoload() -> None:
    """Do nothing: PyTorch wants a function, and importing has done it."""
