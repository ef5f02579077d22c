"""Tensors that are not one piece of memory: what is inside them, and how a file describes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aiostage import _private
from aiostage._warnings import without_warnings
from aiostage.format.safetensors import checked_sizes
from aiostage.format.values import torch_constant

__all__ = [
    "COMPOSITES",
    "SPARSE",
    "assemble",
    "check_invariants",
    "inner_tensors",
    "quantized_over",
    "scheme_of",
    "take_apart",
]

_BY_ROW = (torch.sparse_csr, torch.sparse_bsr)
_COMPRESSED = (*_BY_ROW, torch.sparse_csc, torch.sparse_bsc)
_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_affine_float_qparams)

COMPOSITES = ("sparse", "sparse_compressed", "quantized")
"""The names of the kinds in the manifest."""

SPARSE = {"sparse": 2, "sparse_compressed": 3}
"""Those of them that are sparse, and how many parts each consists of."""


def scheme_of(tensor: torch.Tensor) -> Any:
    """Return the quantization scheme of a quantized tensor.

    Raises:
        ValueError: If it has no quantizer, so that its elements mean nothing.
    """
    try:
        scheme = tensor.qscheme() if _private.has_quantizer(tensor) else None
    except RuntimeError:
        # Of torch.empty() with a quantized dtype.
        scheme = None
    if scheme is None:
        raise ValueError("it has a quantized dtype, but no quantizer")
    return scheme


def inner_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """Return the tensors inside one that is not one piece of memory, by name; None if it is one piece.

    Args:
        tensor: On any device, of a class that is not a wrapper.

    Raises:
        ValueError: If it is of a layout or a quantization scheme that cannot be carried, with the reason.
    """
    if tensor.is_quantized:
        scheme = scheme_of(tensor)
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        if scheme == torch.per_tensor_affine:
            return {"memory": memory}
        if scheme in _PER_CHANNEL:
            scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
            return {"memory": memory, "scales": scales, "zero_points": zero_points}
        raise ValueError(f"its quantization scheme {scheme} cannot be written to a file")
    if tensor.layout is torch.strided:
        return None
    if tensor.layout is torch.sparse_coo:
        # The private ones work for tensors that are not coalesced too, and do not coalesce them.
        indices, values = _private.sparse_indices, _private.sparse_values
        if indices is None or values is None:
            if not tensor.is_coalesced():
                raise ValueError("it is a sparse tensor that is not coalesced, which this PyTorch cannot read")
            indices, values = torch.Tensor.indices, torch.Tensor.values
        return {"indices": indices(tensor), "values": values(tensor)}
    if tensor.layout in _BY_ROW:
        return {"compressed": tensor.crow_indices(), "plain": tensor.col_indices(), "values": tensor.values()}
    if tensor.layout in _COMPRESSED:
        return {"compressed": tensor.ccol_indices(), "plain": tensor.row_indices(), "values": tensor.values()}
    raise ValueError(f"its layout {tensor.layout} cannot be written to a file")


def take_apart(tensor: torch.Tensor) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]] | None:
    """Take a tensor apart that is not one piece of memory.

    Args:
        tensor: In host memory, of a class that is not a wrapper.

    Returns:
        Its kind, its parts by name, and what else describes it, as JSON; None if it is one piece of memory.

    Raises:
        ValueError: If it is of a layout or a quantization scheme that cannot be carried, with the reason.
    """
    parts = inner_tensors(tensor)
    if parts is None:
        return None
    if tensor.is_quantized:
        return "quantized", parts, _form_of_quantized(tensor)
    form: dict[str, Any] = {"shape": list(tensor.shape)}
    if tensor.layout is torch.sparse_coo:
        return "sparse", parts, form | {"coalesced": tensor.is_coalesced()}
    return "sparse_compressed", parts, form | {"layout": str(tensor.layout).removeprefix("torch.")}


def _form_of_quantized(tensor: torch.Tensor) -> dict[str, Any]:
    scheme = tensor.qscheme()
    form: dict[str, Any] = {
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset(),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "scheme": str(scheme).removeprefix("torch."),
    }
    if scheme == torch.per_tensor_affine:
        # The scale is a double; as hexadecimal text it is exact.
        return form | {"scale": tensor.q_scale().hex(), "zero_point": tensor.q_zero_point()}
    return form | {"axis": tensor.q_per_channel_axis()}


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
    # Sparse layouts are in beta and quantized ones deprecated; PyTorch has warned the code that made the tensor.
    with without_warnings():
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
    return quantized_over(parts[0], dtype, form["offset"], shape, checked_sizes(form["stride"]), parameters)


def quantized_over(
    memory: torch.Tensor,
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    parameters: tuple[Any, ...],
) -> torch.Tensor:
    """Return a quantized tensor over memory.

    Args:
        memory: One-dimensional uint8.
        dtype: A quantized one.
        offset: The offset of the first element, in elements.
        shape: The shape of the tensor.
        stride: The stride of the tensor, in elements.
        parameters: Its quantization scheme, and what that needs: scale and zero point, or scales, zero points and axis.
    """
    storage = memory.untyped_storage()
    # As torch.load does it, with a storage of a deprecated class. _internal keeps that from warning.
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]
    tensor: torch.Tensor = _private.require("rebuild_qtensor")(typed, offset, shape, stride, parameters, False, {})
    return tensor
