"""Kinds of PyTorch that are no tensors of one piece of memory: generators, storages, what operators return, jagged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from aiostage.format.kinds import Kind, NotCarried, Parts
from aiostage.format.values import torch_constant

__all__ = ["TORCH_KINDS"]

_RETURN_TYPES: dict[str, type] = {
    name: cls for name, cls in vars(torch.return_types).items() if isinstance(cls, type) and issubclass(cls, tuple)
}
_LAZY: dict[str, Any] = {cls.__name__: cls for cls in (UninitializedParameter, UninitializedBuffer)}
# The dtypes that have a class of typed storages, such as torch.FloatStorage, apart from quantized ones.
_STORAGE_DTYPES = frozenset(
    (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.complex128,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
)
_SCHEMES: dict[str, Any] = {
    str(scheme): scheme
    for scheme in (
        torch.per_tensor_affine,
        torch.per_tensor_symmetric,
        torch.per_channel_affine,
        torch.per_channel_symmetric,
        torch.per_channel_affine_float_qparams,
    )
}


def _take_generator_apart(value: torch.Generator) -> Parts:
    if value.device.type != "cpu":
        raise NotCarried(
            f"a torch.Generator of {value.device} cannot be made where there is no such device",
            "Put its get_state() into the state dict, and call set_state() with that.",
        )
    return Parts(children={"state": value.get_state()})


def _rebuild_generator(form: Mapping[str, Any], children: Sequence[Any]) -> torch.Generator:
    (state,) = children
    return torch.Generator(device="cpu").set_state(state)


def _take_returned_apart(value: Any) -> Parts:
    return Parts({"name": type(value).__name__}, {str(index): item for index, item in enumerate(value)})


def _rebuild_returned(form: Mapping[str, Any], children: Sequence[Any]) -> Any:
    return _RETURN_TYPES[form["name"]](children)


def _bytes_over(storage: torch.UntypedStorage) -> torch.Tensor:
    if storage.device.type != "cpu":
        raise NotCarried(f"it is a storage on {storage.device}", "Stage it first.")
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)


def _untyped(children: Sequence[Any]) -> torch.UntypedStorage:
    (memory,) = children
    # Ties stay: tensors over the same storage have been read into the same memory.
    storage: torch.UntypedStorage = memory.untyped_storage()
    if memory.dtype is not torch.uint8 or storage.nbytes() != memory.numel():
        raise ValueError("the memory of a storage has another size")
    return storage


def _rebuild_storage(form: Mapping[str, Any], children: Sequence[Any]) -> torch.UntypedStorage:
    return _untyped(children)


def _take_typed_apart(value: torch.TypedStorage) -> Parts:
    if value.dtype not in _STORAGE_DTYPES:
        raise NotCarried(f"a TypedStorage of {value.dtype} cannot be carried", "Put its untyped() into the state dict.")
    dtype = str(value.dtype).removeprefix("torch.")
    return Parts({"dtype": dtype}, {"memory": _bytes_over(value._untyped_storage)})


def _rebuild_typed(form: Mapping[str, Any], children: Sequence[Any]) -> Any:
    dtype = torch_constant(form["dtype"])
    if dtype not in _STORAGE_DTYPES:
        raise ValueError("the dtype of a storage is unknown")
    # _internal keeps PyTorch from warning that the class is deprecated.
    return torch.storage.TypedStorage(wrap_storage=_untyped(children), dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def _take_scheme_apart(value: Any) -> Parts:
    return Parts({"value": str(value)})


def _take_lazy_apart(value: Any) -> Parts:
    # The data has no elements yet, but a dtype; whether it is a parameter is noted as for other tensors.
    dtype = str(value.data.dtype).removeprefix("torch.")
    return Parts({"name": type(value).__name__, "dtype": dtype}, {}, vars(value))


def _rebuild_lazy(form: Mapping[str, Any], children: Sequence[Any]) -> Any:
    dtype = torch_constant(form["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError("the dtype of a lazy parameter is unknown")
    return _LAZY[form["name"]](requires_grad=False, dtype=dtype)


TORCH_KINDS: tuple[Kind, ...] = (
    Kind("torch.Generator", (torch.Generator,), _take_generator_apart, _rebuild_generator),
    Kind("torch.return_types", tuple(_RETURN_TYPES.values()), _take_returned_apart, _rebuild_returned),
    Kind(
        "UntypedStorage",
        (torch.UntypedStorage,),
        lambda value: Parts(children={"memory": _bytes_over(value)}),
        _rebuild_storage,
    ),
    Kind("lazy", tuple(_LAZY.values()), _take_lazy_apart, _rebuild_lazy),
    Kind("TypedStorage", (torch.TypedStorage,), _take_typed_apart, _rebuild_typed),
    Kind("qscheme", (torch.qscheme,), _take_scheme_apart, lambda form, children: _SCHEMES[form["value"]]),
)
