"""Trees that change between the stagings of one stager; every result is kept, and compared in the end."""

from __future__ import annotations

import asyncio
import copy
import sys
import warnings
from collections import Counter
from contextlib import suppress
from typing import Any

import torch

from aiostage import AsyncStager
from tests.fuzz.choices import Choices
from tests.fuzz.describing import Description, describe, difference
from tests.fuzz.staging import PROFILES, Mismatch, check_same

__all__ = ["check_changes", "main"]

FAITHFUL = [options for options in PROFILES if options.dtype is None]
"""Those whose copies are what `copy.deepcopy` gives, which is what copies are compared with here."""


class Model:
    """A tree of tensors alone, so that plans are replayed, and what changes it.

    Args:
        choices: What is random about it.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.serial = 0
        self.base = torch.arange(48.0)
        self.weights: dict[str, Any] = {
            f"w{n}": torch.full((4,), float(n)) for n in range(choices.pick([3, 12, 3, 12, 12, 520]))
        }
        self.weights |= {"view": self.base[4:10], "low": self.base[:6], "base": self.base}
        self.tree: dict[str, Any] = {
            "model": self.weights,
            "step": 0,
            "state": [{"a": torch.ones(2)}, (torch.ones(1),)],
        }
        if choices.below(2):
            self.tree["parameter"] = torch.nn.Parameter(torch.ones(3))

    def part(self) -> Any:
        """Return the whole tree, or some of it."""
        kind = self.choices.below(6)
        if kind > 2:
            return self.tree
        if kind == 2:
            return [self.tree["state"], self.weights]
        count = self.choices.pick([2, 255, 256, 257, 512])
        return dict(list(self.weights.items())[:count])

    def change(self) -> str:
        """Make one change; return its name."""
        self.serial += 1
        names = [name for name, value in self.weights.items() if isinstance(value, torch.Tensor)]
        name, other = self.choices.pick(names), self.choices.pick(names)
        tensor, serial = self.weights[name], float(self.serial)
        kinds = [
            "none", "value", "data", "data_shape", "set", "swap", "new", "shape", "dtype", "stride", "tie", "untie",
            "view", "attribute", "unattribute", "grad", "ungrad", "requires", "remove", "add", "parameter", "sparse",
            "circle", "resize", "order", "atom", "ties", "back",
        ]  # fmt: skip
        kind = self.choices.pick(kinds)
        with torch.no_grad():
            self._change(kind, name, other, tensor, serial)
        return kind

    def _change(self, kind: str, name: str, other: str, tensor: torch.Tensor, serial: float) -> None:
        weights = self.weights
        strided = tensor.layout is torch.strided
        if kind == "value" and strided:
            tensor.fill_(serial)
        elif kind == "data" and strided:
            tensor.data = torch.full(tuple(tensor.shape), serial)
        elif kind == "data_shape" and strided:
            tensor.data = torch.full((self.serial % 5, 2), serial)
        elif kind == "set" and strided:
            tensor.set_(torch.full((3,), serial, dtype=tensor.dtype))
        elif kind == "swap" and type(tensor) is type(weights[other]) and tensor.grad is weights[other].grad is None:
            if tensor is not weights[other] and not (tensor.requires_grad or weights[other].requires_grad):
                # Refused, with nothing changed, where views refer to one of them.
                with suppress(RuntimeError):
                    torch.utils.swap_tensors(tensor, weights[other])
        elif kind in ("new", "untie"):
            weights[name] = torch.full((4,), serial)
        elif kind == "shape":
            weights[name] = torch.full((2, 1, self.serial % 4), serial)
        elif kind == "dtype":
            weights[name] = torch.full((4,), serial, dtype=torch.float64 if self.serial % 2 else torch.int32)
        elif kind == "stride":
            weights[name] = (torch.arange(6.0) + serial).reshape(2, 3).t()
        elif kind == "tie":
            weights[name] = weights[other]
        elif kind == "view" and strided and weights[other].layout is torch.strided:
            weights[name] = (
                weights[other].detach()[self.serial % 2 :] if weights[other].dim() else weights[other].detach()
            )
        elif kind == "attribute":
            tensor.note = [self.serial, torch.full((1,), serial)]  # type: ignore[attr-defined]
        elif kind == "unattribute":
            vars(tensor).clear()
        elif kind == "circle" and tensor.is_leaf:
            tensor.owner = self.tree["state"]  # type: ignore[attr-defined]
        elif kind == "grad" and tensor.is_floating_point() and tensor.is_leaf and strided:
            tensor.grad = torch.full_like(tensor, serial).detach()
        elif kind == "ungrad":
            tensor.grad = None
        elif kind == "requires" and tensor.is_floating_point() and tensor.is_leaf and tensor._base is None:
            tensor.requires_grad_(not tensor.requires_grad)
        elif kind == "remove" and len(weights) > 2:
            del weights[name]
        elif kind == "add":
            weights[f"added{self.serial}"] = torch.full((self.serial % 7,), serial)
        elif kind == "parameter":
            weights[name] = torch.nn.Parameter(torch.full((2,), serial))
        elif kind == "sparse":
            weights[name] = torch.eye(2).mul(serial).to_sparse()
        elif kind == "resize" and strided and tensor.storage_offset() == 0 and tensor.untyped_storage().resizable():
            if not tensor.requires_grad and tensor is not self.base:
                tensor.resize_(9).fill_(serial)
        elif kind == "order":
            weights[name] = weights.pop(name)
        elif kind == "ties":
            self.tree["tied"] = list(weights.values())[: self.choices.pick([3, 200, 256])]
        elif kind == "back":
            self.tree.pop("tied", None)
        elif kind == "atom":
            self.tree["step"] = self.serial


async def check_changes(stager: AsyncStager, choices: Choices) -> int:
    """Stage a tree again and again with changes in between; return how often.

    Raises:
        Mismatch: If a result is not what deepcopy gave at its time, then or at the end.
    """
    model = Model(choices)
    kept: list[tuple[Any, Description, Description, list[str]]] = []
    done: list[str] = []
    for _ in range(3 + choices.below(8)):
        # Structures are learnt in the second staging and recognized from the third on.
        for _ in range(choices.pick([1, 1, 3])):
            trees = [model.part() for _ in range(choices.pick([1, 1, 2, 3]))]
            wanted = []
            with torch.no_grad():
                for tree in trees:
                    try:
                        wanted.append((describe(copy.deepcopy(tree), bare=True), describe(tree)))
                    except RuntimeError:
                        # A view was written to after its base came to require a gradient.
                        return len(kept)
            try:
                copies = await asyncio.gather(*map(stager.stage, trees))
            except Exception as error:
                raise Mismatch(f"after {done}: {type(error).__name__}: {error}") from error
            for staged, (expected, source) in zip(copies, wanted, strict=True):
                kept.append((staged, expected, source, list(done)))
                check_last(kept[-1:])
        for _ in range(1 + choices.below(2)):
            done.append(model.change())
    check_last(kept)
    return len(kept)


def check_last(kept: list[tuple[Any, Description, Description, list[str]]]) -> None:
    for staged, expected, source, done in kept:
        try:
            found = describe(staged, bare=True)
            wrong = difference(expected, found)
            if wrong is not None:
                raise Mismatch(wrong)
            if len(kept) == 1:
                check_same(source, expected, found)
        except Mismatch as error:
            raise Mismatch(f"after {done}: {error}") from None


async def check_seeds(n: int, seed: int, results: Counter[str]) -> list[str]:
    """Check ``n`` sequences; return what was wrong."""
    failures = []
    for number in range(seed, seed + n):
        async with AsyncStager(FAITHFUL[number % len(FAITHFUL)]) as stager:
            try:
                results["stagings"] += await check_changes(stager, Choices(number))
            except Mismatch as error:
                failures.append(f"seed {number}: {str(error)[:600]}")
    return failures


def main(n: int, seed: int) -> int:
    """Run ``n`` sequences of changes and stagings. Return how many were wrong."""
    warnings.simplefilter("ignore")
    results: Counter[str] = Counter()
    failures = asyncio.run(check_seeds(n, seed, results))
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{n:6} sequences of changes with {results['stagings']} stagings, {len(failures)} failed")
    return len(failures)
