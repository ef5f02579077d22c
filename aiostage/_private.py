"""Every function that aiostage uses of PyTorch, NumPy, CPython, anyio and accelerate that they do not promise.

Each is looked up by its name when this module is imported. One that is gone is None here, and :data:`CONSEQUENCES` says
what aiostage does without it: the same result more slowly, or a refusal. It never guesses. Modules ask for these
names through this module when they use them, so that a test can take each away.
:func:`untrack_all` alone is promised, by CPython's C API, and needs no substitute.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from itertools import compress
from typing import Any

import torch

__all__ = [
    "CONSEQUENCES",
    "DTENSOR_PLACEMENTS",
    "DTENSOR_SPECS",
    "KEPT_HASHES",
    "find",
    "foreach_copy",
    "has_quantizer",
    "has_storage",
    "have_attributes",
    "is_wrapper",
    "make_parameter",
    "narrow_by_index",
    "prepared_by",
    "require",
    "share_ragged_size",
    "slices_files",
    "slot_names",
    "storage_identity",
    "untrack_all",
    "without_torch_function",
]


def find(name: str) -> Any:
    """Return what a dotted name leads to, or None if there is no such thing.

    Args:
        name: The dotted name of a module and of attributes in it.
    """
    head, *rest = name.split(".")
    try:
        found: Any = import_module(head)
    except Exception:
        return None
    for number, part in enumerate(rest, 1):
        if not hasattr(found, part):
            try:
                import_module(".".join([head, *rest[:number]]))
            except Exception:
                return None
        found = getattr(found, part, None)
    return found


# Whether a leaf is plain, conjugate, negative, sparse, quantized or a wrapper, in one number for thousands of leaves at
# once; the public questions are several calls a leaf.
dispatch_keys: Callable[[torch.Tensor], Any] | None = find("torch._C._dispatch_keys")
raw_repr: Callable[[Any], int] | None = find("torch._C.DispatchKeySet.raw_repr")
# Compares thousands of tensors with what they were like before, in one call.
TensorGuards: Any = find("torch._C._dynamo.guards.TensorGuards")
# The only trace that a write in place leaves.
version_of: Any = find("torch.Tensor._version")
# Asking a tensor without a storage for it raises an error.
_has_storage: Any = find("torch._C._has_storage")
# nn.Parameter() looks at its argument and may call code of its class.
_make_subclass: Any = find("torch.Tensor._make_subclass")
# What PyTorch itself unpickles with: no public function makes a quantized tensor over given memory.
rebuild_qtensor: Any = find("torch._utils._rebuild_qtensor")
# Whether a quantized tensor has a quantizer: without one, asking it for its scheme ends the process.
cdata: Any = find("torch.Tensor._cdata")
# The public ones refuse tensors that are not coalesced.
sparse_indices: Any = find("torch.Tensor._indices")
sparse_values: Any = find("torch.Tensor._values")
# One call, which gives the GIL away once, for many tensors.
_foreach_copy: Any = find("torch._foreach_copy_")
# Inspecting a leaf must not run the code of its subclass.
_without_torch_function: Any = find("torch._C.DisableTorchFunctionSubclass")
# To say what kind of tensor it is that has no storage.
is_zero_tensor: Any = find("torch.Tensor._is_zerotensor")
is_functorch_wrapped: Any = find("torch._C._functorch.is_functorch_wrapped_tensor")
is_functional: Any = find("torch._is_functional_tensor")
# Whether a device has record_stream: calling it to find out raises.
has_kernel: Any = find("torch._C._dispatch_has_kernel_for_dispatch_key")
privateuse1_name: Any = find("torch._C._get_privateuse1_backend_name")
# On which devices this process works already: asking for a stream would create a context on each.
cuda_has_context: Any = find("torch._C._cuda_hasPrimaryContext")
# What the copy protocol says of objects that are made before their attributes are there.
new_object: Any = find("copyreg.__newobj__")
# The question that PyTorch itself asks of wrapper subclasses.
is_traceable_wrapper: Any = find("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
# The list that copy and pickle use, private names and inherited slots included.
_slotnames: Any = find("copyreg._slotnames")
# The stack of a thread that holds the loop, read from another thread.
current_frames: Any = find("sys._current_frames")
# Metadata and arrays in checkpoints of DCP name these; they are let through by name, and no others.
get_layout: Any = find("torch.serialization._get_layout")
numpy_reconstruct: Any = find("numpy._core.multiarray._reconstruct") or find("numpy.core.multiarray._reconstruct")
numpy_scalar: Any = find("numpy._core.multiarray.scalar") or find("numpy.core.multiarray.scalar")
# PyTorch's own way to send storages to other processes, for those that are not ours.
forking_reducers: Any = find("multiprocessing.reduction.ForkingPickler._extra_reducers")
# Where the classes of a DTensor's layout are, by name: a tree has objects of them only where they were imported.
DTENSOR_PLACEMENTS = "torch.distributed.tensor.placement_types"
DTENSOR_SPECS = "torch.distributed.tensor._dtensor_spec"
# Attributes in which objects keep what follows from the others. A hash is kept once an operation on a DTensor has asked
# for it, which is no change of the tensor.
KEPT_HASHES = {
    (DTENSOR_SPECS, "DTensorSpec"): "_hash",
    ("torch.distributed.device_mesh", "DeviceMesh"): "_hash",
}
# anyio imports it with the first use, on the event loop.
asyncio_backend: Any = find("anyio._backends._asyncio")

DISTRIBUTED = {
    "storage_setup": "torch.distributed.checkpoint._storage_utils._storage_setup",
    "narrow_tensor_by_index": "torch.distributed._shard._utils.narrow_tensor_by_index",
    "ragged_sizes": "torch.nested._internal.nested_tensor._tensor_symint_registry",
    "slice_file": "torch.distributed.checkpoint.filesystem.FileSystemReader._slice_file",
}
"""Looked up when they are asked for, because they take much of PyTorch with them that few programs need."""

ACCELERATE = {
    "prepared_models": "_models",
    "prepared_optimizers": "_optimizers",
    "prepared_schedulers": "_schedulers",
    "prepared_custom": "_custom_objects",
}
"""Attributes of an accelerate.Accelerator, whose class does not have them."""

CONSEQUENCES = {
    "dispatch_keys": "each leaf is classified by itself: slower, the same result",
    "raw_repr": "each leaf is classified by itself: slower, the same result",
    "TensorGuards": "each staging inspects each leaf again: slower, with the same result",
    "version_of": "stage() refuses unless detect_torn=False",
    "_has_storage": "a tensor is asked for its storage instead",
    "_make_subclass": "nn.Parameter() is called instead",
    "rebuild_qtensor": "quantized tensors are refused",
    "cdata": "quantized tensors are refused",
    "sparse_indices": "sparse tensors that are not coalesced are refused",
    "sparse_values": "sparse tensors that are not coalesced are refused",
    "_foreach_copy": "tensors are copied one by one: slower, the same result",
    "_without_torch_function": "a subclass's own __torch_function__ runs while its leaf is inspected",
    "is_zero_tensor": "what has no storage is refused all the same, with a more general reason",
    "is_functorch_wrapped": "what has no storage is refused all the same, with a more general reason",
    "is_functional": "what has no storage is refused all the same, with a more general reason",
    "has_kernel": "record_stream is taken to exist for every device but MPS",
    "privateuse1_name": "record_stream is taken to exist for every device but MPS",
    "cuda_has_context": "every device is taken to have a context",
    "storage_setup": "dcp.save and dcp.load raise StagingError",
    "narrow_tensor_by_index": "Tensor.narrow is called for each dimension instead",
    "ragged_sizes": "a staged jagged tensor cannot be combined with its source, only with its own like",
    "slice_file": "dcp.load reads the records of a directory through PyTorch's views: slower, the same result",
    "new_object": "objects are only built once all their tensors are there",
    "is_traceable_wrapper": "a subclass with __tensor_flatten__ and __tensor_unflatten__ is taken for a wrapper",
    "_slotnames": "the slots of a class are found through its bases",
    "current_frames": "a report of a loop hold has no stack",
    "forking_reducers": "multiprocessing sends staged tensors in shared memory as copies of their bytes",
    "prepared_models": "AcceleratorCheckpoints raises RuntimeError",
    "prepared_optimizers": "AcceleratorCheckpoints raises RuntimeError",
    "prepared_schedulers": "AcceleratorCheckpoints raises RuntimeError",
    "prepared_custom": "AcceleratorCheckpoints raises RuntimeError",
    "get_layout": "dcp.load refuses checkpoints with the layout of a tensor in their metadata, which all have",
    "numpy_reconstruct": "dcp.load refuses arrays of NumPy unless weights_only=False",
    "numpy_scalar": "dcp.load refuses numbers of NumPy unless weights_only=False",
    "asyncio_backend": "anyio is imported with its first use, which holds that loop for 10 ms",
}
"""What happens without each of the names above."""


def require(name: str) -> Any:
    """Return one of the names above, for those that nothing can stand in for.

    Raises:
        RuntimeError: If it is gone. The caller says what cannot be done and what else can.
    """
    found = find(DISTRIBUTED[name]) if name in DISTRIBUTED else globals()[name]
    if found is None:
        raise RuntimeError(f"PyTorch {torch.__version__} lacks {name}; without it {CONSEQUENCES[name]}")
    return found


def prepared_by(accelerator: Any, kind: str) -> list[Any]:
    """Return what an accelerate.Accelerator has prepared.

    Args:
        accelerator: An accelerator of any kind.
        kind: ``"models"``, ``"optimizers"``, ``"schedulers"``, or ``"custom"`` for what was registered.

    Raises:
        RuntimeError: If it does not tell.
    """
    found = getattr(accelerator, ACCELERATE[f"prepared_{kind}"], None)
    if found is None:
        raise RuntimeError(f"this version of accelerate lacks {ACCELERATE[f'prepared_{kind}']}, which is needed here")
    prepared: list[Any] = found
    return prepared


def without_torch_function() -> AbstractContextManager[Any]:
    """Return a context in which tensor subclasses are treated as the tensors that they are."""
    context: AbstractContextManager[Any] = (_without_torch_function or nullcontext)()
    return context


def has_storage(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has a storage of its own."""
    if _has_storage is not None:
        return bool(_has_storage(tensor))
    try:
        tensor.untyped_storage()
    except RuntimeError:
        return False
    return True


def _tell_attributes() -> frozenset[type]:
    """Return of which classes the objects are that a tensor refers to, if attributes are always in a dictionary."""
    probe = torch.empty(0, device="cpu")
    probe.attribute = {}  # type: ignore[attr-defined]
    told = len(list(filter(None, gc.get_referents(probe)))) > 1
    return frozenset((type(torch.Tensor), type(torch.nn.Parameter), dict)) if told else frozenset()


_REFERENTS = _tell_attributes()


def have_attributes(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether some tensor has attributes of its own."""
    # An ordinary tensor refers to its class alone, one with attributes also to their dictionary, or from Python 3.14 on
    # to them. vars() would answer too, but gives every tensor that has none a dictionary to keep.
    referents = gc.get_referents(*tensors)
    if len(referents) == len(tensors):
        return False
    # A tensor that copy.deepcopy has copied once has an empty dictionary: asked of all at once, and of no other
    # objects, whose code that would call.
    if set(map(type, referents)) <= _REFERENTS and len(list(filter(None, referents))) == len(tensors):
        return False
    # Without a step of Python for each.
    have_more = map((1).__lt__, map(len, map(gc.get_referents, tensors)))
    return any(map(vars, compress(tensors, have_more)))


def _class_in_memory(tensor: torch.Tensor) -> int | None:
    """Return a number for the class that a tensor has in C++; None if it cannot be told."""
    if cdata is None:
        return None
    with without_torch_function():
        # An object of a class with virtual functions begins with the address of their table.
        return ctypes.c_void_p.from_address(cdata.__get__(tensor)).value


_PLAIN_CLASS = _class_in_memory(torch.empty(0, device="cpu"))


def has_quantizer(tensor: torch.Tensor) -> bool:
    """Return whether a quantized tensor has a quantizer.

    A view of one by a dtype has none, ``q.view(torch.qint8)`` too. It is an object of the class of plain tensors, and
    what asks it for its quantizer reads memory behind its end.
    """
    found = _class_in_memory(tensor)
    return found is not None and found != _PLAIN_CLASS


def storage_identity(storage: torch.UntypedStorage) -> int:
    """Return a number that two living storage objects have in common exactly when they are one storage."""
    # PyTorch returns the same object for a storage for as long as anything refers to that object.
    identity: int = getattr(storage, "_cdata", id(storage))
    return identity


def make_parameter(tensor: torch.Tensor, requires_grad: bool) -> torch.nn.Parameter:
    """Return a Parameter over the memory of a tensor."""
    if _make_subclass is None:
        return torch.nn.Parameter(tensor, requires_grad)
    made: torch.nn.Parameter = _make_subclass(torch.nn.Parameter, tensor, requires_grad)
    return made


def foreach_copy(
    destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, non_blocking: bool = False
) -> None:
    """Copy tensors, in one fused operation where there is one."""
    if _foreach_copy is not None:
        _foreach_copy(list(destinations), list(sources), non_blocking=non_blocking)
        return
    for destination, source in zip(destinations, sources, strict=True):
        destination.copy_(source, non_blocking=non_blocking)


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is of a subclass that tells what it wraps."""
    if is_traceable_wrapper is not None:
        return bool(is_traceable_wrapper(tensor))
    return hasattr(type(tensor), "__tensor_flatten__") and hasattr(type(tensor), "__tensor_unflatten__")


def narrow_by_index(tensor: torch.Tensor, offsets: Iterable[int], sizes: Iterable[int]) -> torch.Tensor:
    """Return the part of a tensor that begins at some offsets and has some sizes, one for each dimension."""
    narrow = find(DISTRIBUTED["narrow_tensor_by_index"])
    if narrow is not None:
        narrowed: torch.Tensor = narrow(tensor, list(offsets), list(sizes))
        return narrowed
    for dimension, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dimension, offset, size)
    return tensor


def slices_files() -> bool:
    """Return whether DCP's reader of a directory asks a method of its own for each record, by a file and an entry."""
    method = find(DISTRIBUTED["slice_file"])
    # A method that takes anything else is another one, and a method in its place would not be called as it expects.
    return method is not None and list(inspect.signature(method).parameters) == ["self", "file", "sinfo"]


def share_ragged_size(source: torch.Tensor, staged: torch.Tensor) -> None:
    """Let the offsets, or lengths, of a staged jagged tensor stand for the same ragged size as those of its source.

    Jagged tensors combine only if their ragged sizes are one symbol, which PyTorch keeps by the identity of the tensor
    that defines it. copy.deepcopy of a jagged tensor keeps that tensor itself.
    """
    sizes = find(DISTRIBUTED["ragged_sizes"])
    if sizes is not None and source in sizes:
        sizes[staged] = sizes[source]


def slot_names(cls: type) -> list[str]:
    """Return the names of the slots of a class, as the copy protocol knows them."""
    if _slotnames is not None:
        return list(_slotnames(cls))
    names: list[str] = []
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name in ("__dict__", "__weakref__"):
                continue
            if name.startswith("__") and not name.endswith("__"):
                owner = base.__name__.lstrip("_")
                name = f"_{owner}{name}" if owner else name
            names.append(name)
    return names


_untrack = ctypes.PyDLL(None).PyObject_GC_UnTrack
_untrack.argtypes = [ctypes.py_object]
_untrack.restype = None

_consume = deque[None](maxlen=0).extend


def untrack_all(objects: Iterable[object]) -> None:
    """Take objects that can be in no circle, and that no other code owns, out of the collector's lists.

    A list of 50,000 entries costs a millisecond each time that it is looked at: with those of a staging of as many
    leaves in sight, the collector's usual runs during it took up to 6.6 ms at a time, and without them 2.1 ms. It is
    public C API, and freeing an object that is not in the lists is allowed for.
    """
    _consume(map(_untrack, objects))
