"""Sparse tensors of a checkpoint, checked in host memory and off the event loop before any device has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from aiostage.format.composites import SPARSE, check_invariants
from aiostage.format.decode import Memory
from aiostage.format.nodes import NodeTable, reading
from aiostage.format.safetensors import Record

__all__ = ["check_sparse", "parts_of_sparse"]


def parts_of_sparse(table: NodeTable, path: str) -> set[str]:
    """Return the names of the tensors of files that sparse tensors of the tree consist of.

    Args:
        table: Of the nodes, looked through before.
        path: Of the manifest, for errors.

    Raises:
        CheckpointCorruptError: If a sparse tensor consists of something else.
    """
    names: set[str] = set()
    with reading(path):
        for index in _sparse(table):
            names.update(table.forms[part]["name"] for part in _parts(table, index))
    return names


def check_sparse(table: NodeTable, records: Mapping[str, Record], data: Mapping[str, torch.Tensor], path: str) -> None:
    """Check that indices lie within the shapes, and what else PyTorch demands. Blocks: run it in a worker thread.

    Args:
        table: Of the nodes, looked through before.
        records: The tensors of files, by name.
        data: Host memory with the bytes of those that :func:`parts_of_sparse` returns.
        path: Of the manifest, for errors.

    Raises:
        CheckpointCorruptError: If a sparse tensor is none.
    """
    memory = Memory(records, data)
    with reading(path):
        for index in _sparse(table):
            form = table.forms[index]
            parts = [memory.tensor(table.forms[part]) for part in _parts(table, index)]
            check_invariants(form["is"], parts, form)


def _sparse(table: NodeTable) -> list[int]:
    reached = zip(table.forms, table.reached, strict=True)
    return [index for index, (form, how) in enumerate(reached) if how and form["is"] in SPARSE]


def _parts(table: NodeTable, index: int) -> list[int]:
    """Return the nodes that a sparse tensor consists of, without its gradient."""
    parts: list[int] = []
    count = SPARSE[table.forms[index]["is"]]
    for child in table.children[index][:count]:
        node = table.node(child)
        if node is None or table.forms[node]["is"] != "tensor":
            raise ValueError(f"node {index} consists of something that is no tensor")
        parts.append(node)
    if len(parts) != count:
        raise ValueError(f"node {index} consists of {len(parts)} tensors instead of {count}")
    return parts
