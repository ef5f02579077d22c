"""What is staged: few large tensors, many small ones, the state of a real model; and memory to stage it to."""

from __future__ import annotations

import mmap
from typing import Any

import numpy
import torch
from torch import nn

__all__ = ["Adam350M", "few_large", "have_ready", "leaves_of", "many_small"]

GIB = 2**30


def few_large(nbytes: int = 2 * GIB, count: int = 64) -> dict[str, torch.Tensor]:
    """Return float32 tensors of equal size."""
    return {f"layer.{number}.weight": torch.ones(nbytes // 4 // count) for number in range(count)}


def many_small(count: int = 50_000, nbytes: int = 1024) -> dict[str, torch.Tensor]:
    """Return float32 tensors of a few bytes each."""
    return {f"block.{number}.weight": torch.ones(nbytes // 4) for number in range(count)}


class Adam350M:
    """A model of GPT-2 medium's shape in bfloat16 and the state of its Adam, with moments in float32."""

    def __init__(self, width: int = 1024, layers: int = 24, vocabulary: int = 50257, context: int = 1024) -> None:
        self.model = nn.ModuleDict(
            {
                "tokens": nn.Embedding(vocabulary, width),
                "positions": nn.Embedding(context, width),
                "blocks": nn.ModuleList(_block(width) for _ in range(layers)),
                "norm": nn.LayerNorm(width),
            }
        )
        self.optimizer = torch.optim.Adam(self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # After the step, so that the moments stay in float32.
        self.model.to(torch.bfloat16)

    def state_dict(self) -> dict[str, Any]:
        """Return new dicts over the live tensors, as a training loop takes them for each checkpoint."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": 1}


def _block(width: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "norm_1": nn.LayerNorm(width),
            "attention": nn.Linear(width, 3 * width),
            "projection": nn.Linear(width, width),
            "norm_2": nn.LayerNorm(width),
            "up": nn.Linear(width, 4 * width),
            "down": nn.Linear(4 * width, width),
        }
    )


def leaves_of(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of a tree of dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [leaf for child in children for leaf in leaves_of(child)]


def have_ready(nbytes: int) -> None:
    """Use as much memory and a little more, and give it back to the kernel.

    On a virtual machine the kernel's free memory need not exist: the hypervisor finds it when it is first touched, at
    its own speed, and takes it away again seconds after it was freed.
    """
    memory = mmap.mmap(-1, nbytes + nbytes // 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = numpy.frombuffer(memory, numpy.uint8)
    array[:: mmap.PAGESIZE] = 1
    del array
    memory.close()
