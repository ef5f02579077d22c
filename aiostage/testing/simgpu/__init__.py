"""A PyTorch device without hardware: two devices with streams, events and allocators of their own, for tests.

:class:`~aiostage.testing.SimulatedAccelerator` is reached through ``backend=`` and chooses orders; this is a device to
PyTorch itself (PrivateUse1, in C++), which ``torch.accelerator`` finds and ordinary code uses as ``simgpu:0`` and
``simgpu:1``. Each stream has a thread; copies and kernels run as late and as slowly as the test says, and in two
halves; freed memory is handed out at once; host code that touches device memory dies. So code that forgets to wait for
a stream, or frees memory too early, gives wrong bytes here as it would on a GPU.

It changes ``torch.accelerator`` for the whole process, so it is a process of its own that has it::

    python -m aiostage.testing.simgpu python -m pytest tests/on_the_device

The first time it is built, which takes a C++ compiler and a minute or two, into ``$XDG_CACHE_HOME/aiostage``. In the
process, ``torch.simgpu`` has what tests need: ``copy_delay(low, high)`` and ``kernel_delay(low, high)`` in
microseconds, ``sleep(microseconds, device)`` on the current stream, ``Gate(device).release()``, ``drain()``,
``seed(number)``, ``stats()``, ``memory_limit(device, bytes)``, ``in_use(device)``, ``fail_device(failed)``,
``fail_later(microseconds, device)``, ``sync_watch(2)``, which lets a blocking synchronization of the calling thread
raise. Not there: priorities, peers, graphs, registering host memory. No figure from it is a GPU's.
"""

from aiostage.testing.simgpu.building import UnavailableError, build, environment

__all__ = ["UnavailableError", "build", "environment"]
