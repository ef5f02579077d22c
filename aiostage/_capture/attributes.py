"""What hangs on tensors: attributes of their own, in dictionaries and in the slots of their classes."""

from __future__ import annotations

import types
from collections.abc import Generator

import torch

from aiostage import _private
from aiostage._capture.faithful import PLAIN_CLASSES, Refusal
from aiostage._capture.leaves import Leaves
from aiostage._capture.nodes import READS_PER_STEP, AttributesNode, AttributeSteps, Node, parent_of
from aiostage._capture.versions import GONE, ContainerChanges, read_items
from aiostage.leaf import Attribute

__all__ = ["note_attributes", "read_attributes"]

_MANY = 256
"""Attributes beyond which a plain tensor's are read later, in steps."""


def note_attributes(
    tensor: torch.Tensor, index: int, node: Node, slot: int, leaves: Leaves, changes: ContainerChanges
) -> AttributesNode | None:
    """Note the attributes of a tensor, and return the node for them, if there are any to copy.

    Args:
        tensor: Of a class of its own, or with attributes.
        index: Its index.
        node: What leads to it.
        slot: Where in the node.
        leaves: Of the walk.
        changes: Where to note what is compared at capture.

    Raises:
        UnsupportedLeafError: If what its class keeps for itself cannot be found.
    """
    try:
        composite = leaves.composite_of(index, tensor)
    except Refusal as refusal:
        raise refusal.at(node.path(slot)) from None
    leaves.attributed.add(index)
    made = AttributesNode(tensor, node, slot)
    made.leaf = index
    if type(tensor) in PLAIN_CLASSES and len(vars(tensor)) > _MANY:
        return made
    attributes = dict(vars(tensor))
    if composite is None or composite.owned is None:
        changes.add_attributes(vars(tensor), list(attributes), list(attributes.values()), node, slot)
    else:
        attributes = {name: value for name, value in attributes.items() if not composite.owns(name)}
        # What the class keeps for itself is made anew by its own code and may be other objects each time; only the
        # names of the rest are compared, and the values as slots.
        changes.add_names(vars(tensor), list(attributes), composite.owns, node, slot)
        changes.add_slots(tensor, dict(attributes), node, slot)
    names: list[str] = []
    if type(tensor) not in PLAIN_CLASSES:
        names = _private.slot_names(type(tensor))
        changes.add_slots(tensor, {name: getattr(tensor, name, GONE) for name in names}, node, slot)
        attributes |= {name: getattr(tensor, name) for name in names if hasattr(tensor, name)}
    if not attributes:
        return None
    made.slots = frozenset(names)
    # A bound method on a tensor (a weight loader, say) is code, and the module behind it is no part of the tensor.
    made.kept = {name: value for name, value in attributes.items() if type(value) is types.MethodType}
    made.names = [name for name in attributes if name not in made.kept]
    made.children = [attributes[name] for name in made.names]
    made.steps = list(map(Attribute, made.names))
    return made


def read_attributes(node: AttributesNode, changes: ContainerChanges) -> Generator[None, None, None]:
    """Note the many attributes of a tensor, yielding between parts."""
    attributes, names, values = vars(node.source), node.names, node.children
    yield from read_items(attributes, names, values)
    changes.add_attributes(attributes, names, values, parent_of(node), node.slot)
    methods = []
    for start in range(0, len(values), READS_PER_STEP):
        part = values[start : start + READS_PER_STEP]
        if types.MethodType in map(type, part):
            methods += [slot for slot, value in enumerate(part, start) if type(value) is types.MethodType]
        yield
    if methods:
        node.kept = {names[slot]: values[slot] for slot in methods}
        node.names = [name for name in names if name not in node.kept]
        node.children = [attributes[name] for name in node.names]
    node.steps = AttributeSteps(node.names)
