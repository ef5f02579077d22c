"""What encoding a tree costs: objects that the cyclic collector follows, which it runs over again and again."""

from __future__ import annotations

import gc

import torch

from aiostage.format.encode import TreeEncoder

TENSORS = 5000


def test_a_tensor_costs_one_object_that_the_collector_follows() -> None:
    tree = {str(number): torch.zeros(1) for number in range(TENSORS)}
    encoder = TreeEncoder()
    gc.collect()
    gc.disable()
    try:
        # Kept, so that nothing which other tests and threads have left goes away while the walk is counted.
        before = gc.get_objects()
        known = set(map(id, before))
        allocated = gc.get_count()[0]
        encoder.walk(tree)
        allocated = gc.get_count()[0] - allocated
        followed = sum(id(followed) not in known for followed in gc.get_objects())
    finally:
        gc.enable()
    assert len(encoder.tensors) == TENSORS
    # The node; that of the dict, what walks it, and what other threads make meanwhile, are a few more.
    assert TENSORS <= followed < 1.1 * TENSORS
    # What brings the next run nearer.
    assert allocated < 1.1 * TENSORS


def test_no_tensor_gets_a_dict_of_attributes() -> None:
    # It would keep that, and on Python 3.14 the collector follows it.
    tensors = [torch.zeros(number) for number in range(6)] + [torch.nn.Parameter(torch.zeros(2))]
    first, second, *others = tensors
    tree = [{"a": {"b": first}, "c": second}, [], *others]
    encoder = TreeEncoder()
    encoder.walk(tree)
    assert len(encoder.tensors) == len(tensors)
    assert [gc.get_referents(tensor) for tensor in tensors] == [[type(tensor)] for tensor in tensors]
