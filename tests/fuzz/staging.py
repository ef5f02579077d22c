"""Random trees are staged; what comes out is what copy.deepcopy gives, bytes, ties and all."""

from __future__ import annotations

import asyncio
import copy
import gc
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch

from aiostage import AsyncStager, StagingOptions, UnsupportedLeafError
from tests.fuzz.choices import Choices, shrink
from tests.fuzz.classes import Loyal, LoyalTensor
from tests.fuzz.describing import Description, describe, difference, difference_of_cast
from tests.fuzz.trees import Grower

__all__ = ["Mismatch", "check_tree", "main"]

MAY_BE_REFUSED = {
    "meta": r"meta tensor",
    "mkldnn": r"mkldnn",
    "loyal": r"not a copy in host memory",
    "memo": r"another copy of this \S+ into memo",
}
"""What may be refused, and what the refusal says. Anything else has to be staged."""

REFUSED_CAST = r"shares memory with a leaf of another dtype|PyTorch cannot cast|is the gradient of a tensor"
"""What a refusal may say where leaves are cast."""


def is_loyal(path: Any, item: object) -> bool:
    """Return whether something is to be passed through."""
    return isinstance(item, (Loyal, LoyalTensor))


def to_half(path: Any, tensor: torch.Tensor) -> torch.dtype | None:
    """Cast some leaves."""
    return torch.float16 if len(path) % 2 else None


PROFILES = (
    StagingOptions(),
    StagingOptions(max_loop_hold=1e-9),
    StagingOptions(max_loop_hold=math.inf),
    StagingOptions(use_shared_memory=True),
    StagingOptions(use_async_staging=False),
    StagingOptions(detect_torn=False),
    StagingOptions(passthrough=is_loyal),
    StagingOptions(passthrough=is_loyal, detect_torn=False, max_loop_hold=1e-9),
    StagingOptions(dtype=torch.bfloat16),
    StagingOptions(dtype=to_half, passthrough=is_loyal),
)


class Mismatch(AssertionError):
    """A copy that is not what it has to be."""


def reference(tree: Any) -> Any:
    """Return what ``copy.deepcopy`` gives, or the error that it raises."""
    try:
        with torch.no_grad():
            return copy.deepcopy(tree)
    except Exception as error:
        return error


def check_same(
    source: Description,
    expected: Description,
    staged: Description,
    bare: Description | None = None,
    *,
    parting: bool = False,
) -> None:
    """Check that a copy is what deepcopy gives, and shares nothing with its source that deepcopy does not.

    Args:
        source: What was copied.
        expected: What deepcopy gives.
        staged: The copy.
        bare: The source as a copy is described, whose paths are those of the copy. The source if not given.
        parting: Whether code in the tree gives copies memory of their own.

    Raises:
        Mismatch: If not.
    """
    found = difference(expected, staged)
    if found is not None:
        raise Mismatch(found)
    shared = staged.mutable.keys() & source.mutable.keys() - expected.mutable.keys()
    if shared:
        raise Mismatch(f"{staged.mutable[min(shared)]} is the source's own object")
    copied = expected.mutable.keys() & source.mutable.keys() - staged.mutable.keys()
    if copied:
        raise Mismatch(f"{expected.mutable[min(copied)]} is a copy, and not the source's own object")
    bare = source if bare is None else bare
    # Code that parts copies moves the place where one is met first.
    met = (*bare.tensors, *staged.tensors) if parting else bare.tensors
    parameters = {path for path, tensor in met if isinstance(tensor, torch.nn.Parameter)}
    ties, allowed, kept = staged.overlaps(), expected.overlaps(), bare.overlaps()
    for pair in ties.keys() | allowed.keys() | kept.keys():
        if parting and not parameters.isdisjoint(pair):
            continue
        # deepcopy gives each Parameter memory of its own, also if it is a view of another; here it stays one.
        wanted = (allowed if parameters.isdisjoint(pair) else kept).get(pair)
        if ties.get(pair) != wanted:
            raise Mismatch(f"bytes shared by {pair} at a distance of {ties.get(pair)}, expected {wanted}")


def scribble(tree: Description, passed: Collection[torch.Tensor]) -> None:
    """Write over the memory of the tensors of a tree, without that of those that are passed through."""
    kept = {tensor.data_ptr() for tensor in passed}
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        for _, tensor in tree.tensors:
            spared = not tensor.numel() or tensor.is_inference() or tensor.device.type != "cpu"
            if not spared and tensor.data_ptr() not in kept:
                memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                memory.fill_(0x5A)


def grower_for(choices: Choices, options: StagingOptions) -> Grower:
    """Return what grows a tree that a stager with some options is to stage."""
    return Grower(choices, loyal=options.passthrough is not None, plain=options.dtype is not None)


async def check_tree(stager: AsyncStager, choices: Choices, options: StagingOptions) -> str:
    """Grow one tree, stage it twice and compare; return the result.

    Args:
        stager: The stager.
        choices: What is random about the tree.
        options: Those of the stager.

    Raises:
        Mismatch: If a copy is wrong, or there is none and should be one.
    """
    grower = grower_for(choices, options)
    with torch.no_grad():
        tree = grower.tree()
    expected = reference(tree)
    try:
        first, second = await stager.stage(tree), await stager.stage(tree)
    except UnsupportedLeafError as refusal:
        kinds = [kind for kind in grower.kinds if re.search(MAY_BE_REFUSED[kind], str(refusal))]
        if not kinds and options.dtype is not None and re.search(REFUSED_CAST, str(refusal)):
            return "refused: cast"
        if not kinds and not isinstance(expected, Exception):
            raise Mismatch(f"refused without need: {refusal}") from None
        return f"refused: {kinds[0]}" if kinds else f"refused, as by deepcopy: {type(expected).__name__}"
    except Exception as error:
        raise Mismatch(f"{type(error).__name__}: {error}") from error
    if isinstance(expected, Exception) or grower.circular:
        if grower.parting:
            return "nothing to compare with"
        compare_with_source(tree, first, second, options=options)
        return "as the source; deepcopy gives " + (
            type(expected).__name__ if isinstance(expected, Exception) else "a tensor in a circle two copies"
        )
    again = reference(tree)
    source, wanted, bare = describe(tree), describe(expected, bare=True), describe(tree, bare=True)
    changed = difference(wanted, describe(again, bare=True))
    if changed is not None:
        raise Mismatch(f"staging has changed its source: {changed}")
    scribble(source, grower.passed)
    for staged in (first, second):
        found = describe(staged, bare=True)
        if is_joined(difference(wanted, found)) and not grower.parting:
            # Anew, as a description uses iterators up.
            with torch.no_grad():
                tree = grower_for(Choices(values=choices.taken), options).tree()
            compare_with_source(tree, await stager.stage(tree), options=options)
            return "as the source; deepcopy gives an object in a circle through its own constructor two copies"
        if options.dtype is None:
            check_same(source, wanted, found, bare, parting=grower.parting)
        else:
            wrong = difference_of_cast(wanted, found)
            if wrong is not None:
                raise Mismatch(wrong)
    return "as deepcopy" if options.dtype is None else "as deepcopy, cast"


def is_joined(found: str | None) -> bool:
    """Return whether a copy has one object where that of deepcopy has two."""
    return found is not None and re.search(r": expected \('new', .*, found \('met before', ", found) is not None


def compare_with_source(tree: Any, *copies: Any, options: StagingOptions) -> None:
    """Compare where deepcopy gives nothing to compare with: its own faults are with tensors in circles."""
    source = describe(tree, bare=True, as_source=True)
    for staged in copies:
        compare = difference if options.dtype is None else difference_of_cast
        found = compare(source, describe(staged, bare=True, as_source=True), source.computed)
        if found is not None:
            raise Mismatch(found)


async def check_seeds(seeds: Sequence[int], results: Counter[str]) -> None:
    """Check the trees of some seeds, some at a time with one stager.

    Raises:
        Mismatch: At the first that is wrong, with its seed and the smallest tree like it that was found.
    """
    for start in range(0, len(seeds), 20):
        await _check_together(seeds[start : start + 20], PROFILES[seeds[start] // 20 % len(PROFILES)], results)


async def _check_together(seeds: Sequence[int], options: StagingOptions, results: Counter[str]) -> None:
    async with AsyncStager(options) as stager:
        for seed in seeds:
            choices = Choices(seed)
            try:
                results[await check_tree(stager, choices, options)] += 1
            except Mismatch as error:
                raise Mismatch(f"seed {seed}: {error}\n{choices.taken}") from error
        gc.collect()
        leases = stager.statistics().leases
    if leases:
        # Python's collector cannot free some circles through tensors, and so neither a copy of one. The others are
        # checked again without those.
        free = [seed for seed in seeds if is_collected(Choices(seed), options)]
        if len(free) == len(seeds):
            raise Mismatch(f"seeds {seeds[0]} to {seeds[-1]}: {leases} leases are left")
        await _check_together(free, options, Counter())


def is_collected(choices: Choices, options: StagingOptions) -> bool:
    """Return whether the tensors of a tree go when nothing refers to the tree, which was never staged."""

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    before = count()
    with torch.no_grad():
        grower_for(choices, options).tree()
    return count() <= before


def failing(values: Sequence[int], options: StagingOptions) -> str | None:
    """Return how the tree of some choices fails, or None."""

    async def run() -> str | None:
        async with AsyncStager(options) as stager:
            try:
                await check_tree(stager, Choices(values=values), options)
            except Mismatch as error:
                return str(error)
        return None

    return asyncio.run(run())


def _kind(error: str | None) -> str | None:
    """Return what errors of one kind have in common."""
    return error and re.sub(r"(tree|state_dict)\S*|[\d.]+", "", error)[:60]


def _fails_alike(values: Sequence[int], *, options: StagingOptions, kind: str | None) -> bool:
    return _kind(failing(values, options)) == kind


def explain(seed: int) -> str:
    """Return the smallest tree found that fails as that of a seed does."""
    for options in PROFILES:
        choices = Choices(seed)
        with torch.no_grad():
            grower_for(choices, options).tree()
        error = failing(choices.taken, options)
        if error is None:
            continue
        small = shrink(choices.taken, partial(_fails_alike, options=options, kind=_kind(error)))
        with torch.no_grad():
            tree = grower_for(Choices(values=small), options).tree()
        facts = "\n".join(f"{path}: {str(fact)[:100]}" for path, fact in describe(tree).facts)
        return f"{options}\nchoices {small}\n{facts}\n{failing(small, options)}"
    return "does not fail alone"


def main(n: int, seed: int) -> int:
    """Stage ``n`` random trees; print the results, and the seeds that fail. Return how many do."""
    warnings.simplefilter("ignore")
    results: Counter[str] = Counter()
    failures = 0
    for start in range(seed, seed + n, 200):
        seeds = list(range(start, min(start + 200, seed + n)))
        while seeds:
            try:
                asyncio.run(check_seeds(seeds, results))
                break
            except Mismatch as error:
                failures += 1
                print(str(error)[:600], file=sys.stderr)
                failed = int(re.search(r"seeds? (?:\d+ to )?(\d+)", str(error)).group(1))  # type: ignore[union-attr]
                seeds = [other for other in seeds if other > failed]
    for what, count in sorted(results.items()):
        print(f"{count:6} trees: {what}")
    print(f"{failures:6} trees failed")
    return failures
