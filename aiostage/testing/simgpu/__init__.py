"""A PyTorch device without hardware: two devices with streams, events and allocators of their own, for tests.

:class:`~aiostage.testing.SimulatedAccelerator` is passed as ``backend=`` and chooses orders. This one is a device for
PyTorch itself (PrivateUse1, in C++): ``torch.accelerator`` finds it, and ordinary code uses it as ``simgpu:0`` and
``simgpu:1``. Each stream has a thread. Copies and kernels run as late and as slowly as the test says, and in two
halves. Freed memory is allocated again at once. Host code that touches device memory crashes. So code that forgets to
wait for a stream, or frees memory too early, gives wrong bytes here as it would on a GPU.

It changes ``torch.accelerator`` for the whole process. Therefore a command runs in a process of its own that has it::

    python -m aiostage.testing.simgpu python -m pytest tests/on_the_device

The first run builds it, with a C++ compiler and in a minute or two, into ``$XDG_CACHE_HOME/aiostage``. In the process,
``torch.simgpu`` has what tests need: ``copy_delay(low, high)`` and ``kernel_delay(low, high)`` in microseconds,
``sleep(microseconds, device)`` on the current stream, ``Gate(device).release()``, ``drain()``, ``seed(number)``,
``stats()``, ``memory_limit(device, bytes)``, ``in_use(device)``, ``fail_device(failed)``, ``fail_later(microseconds,
device)``, ``sync_watch(2)``, which lets a blocking synchronization of the calling thread raise. It has no priorities,
peers, graphs or registered host memory. Times measured on it are not those of a GPU.
"""

from aiostage.testing.simgpu.building import UnavailableError, build, environment

__all__ = ["UnavailableError", "build", "environment"]
