"""Tensors that are not one piece of memory: how they are taken apart for a file and put together again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from aiostage import _private
from aiostage.format.safetensors import checked_sizes
from aiostage.format.values import torch_constant

__all__ = ["COMPOSITES", "SPARSE", "assemble", "check_invariants", "take_apart"]

_BY_ROW = (torch.sparse_csr, torch.sparse_bsr)
_COMPRESSED = (*_BY_ROW, torch.sparse_csc, torch.sparse_bsc)
_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_affine_float_qparams)

COMPOSITES = ("sparse", "sparse_compressed", "quantized")
"""The names of the kinds in the manifest."""

SPARSE = {"sparse": 2, "sparse_compressed": 3}
"""Those of them that are sparse, and how many parts each consists of."""


def take_apart(tensor: torch.Tensor) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]] | None:
    """Take a tensor apart that is not one piece of memory.

    Args:
        tensor: In host memory, of a class that is not a wrapper.

    Returns:
        Its kind, its parts by name, and what else describes it, as JSON; None if it is one piece of memory.

    Raises:
        ValueError: If it is of a layout or a quantization scheme that cannot be carried, with the reason.
    """
    if tensor.is_quantized:
        return _take_quantized_apart(tensor)
    if tensor.layout is torch.strided:
        return None
    form: dict[str, Any] = {"shape": list(tensor.shape)}
    if tensor.layout is torch.sparse_coo:
        parts = {"indices": tensor._indices(), "values": tensor._values()}
        return "sparse", parts, form | {"coalesced": tensor.is_coalesced()}
    if tensor.layout in _COMPRESSED:
        by_row = tensor.layout in _BY_ROW
        parts = {
            "compressed": tensor.crow_indices() if by_row else tensor.ccol_indices(),
            "plain": tensor.col_indices() if by_row else tensor.row_indices(),
            "values": tensor.values(),
        }
        return "sparse_compressed", parts, form | {"layout": str(tensor.layout).removeprefix("torch.")}
    raise ValueError(f"its layout {tensor.layout} cannot be written to a file")


def _take_quantized_apart(tensor: torch.Tensor) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
    scheme = tensor.qscheme()
    form: dict[str, Any] = {
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset(),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "scheme": str(scheme).removeprefix("torch."),
    }
    parts = {"memory": torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())}
    if scheme == torch.per_tensor_affine:
        return "quantized", parts, form | {"scale": tensor.q_scale().hex(), "zero_point": tensor.q_zero_point()}
    if scheme in _PER_CHANNEL:
        parts |= {"scales": tensor.q_per_channel_scales(), "zero_points": tensor.q_per_channel_zero_points()}
        return "quantized", parts, form | {"axis": tensor.q_per_channel_axis()}
    raise ValueError(f"its quantization scheme {scheme} cannot be written to a file")


def assemble(kind: str, parts: Sequence[torch.Tensor], form: dict[str, Any]) -> torch.Tensor:
    """Put a tensor together.

    Args:
        kind: One of :data:`COMPOSITES`.
        parts: In the order in which :func:`take_apart` returns them.
        form: What else describes it.

    Returns:
        The tensor, over the memory of its parts. Whether these are indices within its shape is not looked at, which
        would wait for a device: :func:`check_invariants` does.

    Raises:
        RuntimeError: If parts and form do not fit each other. Other exceptions are possible too.
    """
    return _assemble(kind, parts, form, check=False)


def check_invariants(kind: str, parts: Sequence[torch.Tensor], form: dict[str, Any]) -> None:
    """Check all that PyTorch demands of a sparse tensor. Blocks, for as long as reading its indices takes.

    Args:
        kind: One of :data:`SPARSE`.
        parts: As for :func:`assemble`, in host memory.
        form: As for :func:`assemble`.

    Raises:
        RuntimeError: If parts and form do not fit each other. Other exceptions are possible too.
    """
    _assemble(kind, parts, form, check=True)


def _assemble(kind: str, parts: Sequence[torch.Tensor], form: dict[str, Any], *, check: bool) -> torch.Tensor:
    with warnings.catch_warnings():
        # Sparse layouts are in beta and quantized ones deprecated; PyTorch has warned the code that made the tensor.
        warnings.simplefilter("ignore")
        shape = checked_sizes(form["shape"])
        if kind == "sparse":
            indices, values = parts
            return torch.sparse_coo_tensor(
                indices,
                values,
                shape,
                is_coalesced=form["coalesced"] is True,
                check_invariants=check,
                device=values.device,
            )
        if kind == "sparse_compressed":
            compressed, plain, values = parts
            layout = torch_constant(form["layout"])
            return torch.sparse_compressed_tensor(
                compressed, plain, values, shape, layout=layout, check_invariants=check, device=values.device
            )
        return _assemble_quantized(parts, form, shape)


def _assemble_quantized(parts: Sequence[torch.Tensor], form: dict[str, Any], shape: tuple[int, ...]) -> torch.Tensor:
    dtype = torch_constant(form["dtype"])
    schemes: dict[str, Any] = {"per_tensor_affine": torch.per_tensor_affine} | {
        str(scheme).removeprefix("torch."): scheme for scheme in _PER_CHANNEL
    }
    scheme = schemes[form["scheme"]]
    parameters: tuple[Any, ...]
    if scheme == torch.per_tensor_affine:
        parameters = (scheme, float.fromhex(form["scale"]), form["zero_point"])
    else:
        parameters = (scheme, parts[1], parts[2], form["axis"])
    memory = parts[0].untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=memory, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]
    tensor: torch.Tensor = _private.require("rebuild_qtensor")(
        typed, form["offset"], shape, checked_sizes(form["stride"]), parameters, False, {}
    )
    return tensor
