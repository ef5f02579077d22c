"""Conjugate and negative views come out as copy.deepcopy gives them, values and strides."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import aiostage

pytestmark = pytest.mark.asyncio


async def test_strides_are_those_of_deepcopy() -> None:
    draw = random.Random(11)
    async with aiostage.AsyncStager() as stager:
        for _ in range(200):
            base = torch.complex(torch.randn(900), torch.randn(900))
            shape = [draw.choice([1, 2, 3, 5]) for _ in range(draw.randrange(5))]
            stride = [draw.choice([0, 1, 2, 3, 7, 15]) for _ in shape]
            view = base.as_strided(shape, stride, draw.randrange(9)).conj()
            tree = [view if draw.random() < 0.5 else view.imag, base]
            expected, staged = copy.deepcopy(tree)[0], (await stager.stage(tree))[0]
            assert staged.stride() == expected.stride(), (shape, stride)
            assert torch.equal(staged, expected), (shape, stride)


@pytest.mark.one_loop
@pytest.mark.parametrize("kind", ["rows", "permuted", "expanded", "imaginary", "transposed"])
async def test_large_ones_that_are_copied_in_several_batches(kind: str) -> None:
    rows = torch.complex(torch.arange(12_000_002.0), torch.ones(12_000_002)).conj()
    view = {
        "rows": rows[:12_000_000].view(2, 3, 2_000_000)[:, ::2],
        "permuted": rows[:12_000_000].view(12000, 4, 250).permute(1, 2, 0)[::2],
        "expanded": rows[:7].view(7, 1).expand(7, 800_000),
        "imaginary": rows.imag[1:].view(1, -1)[:, ::1],
        "transposed": rows[:5_760_000].view(2400, 2400).t(),
    }[kind]
    expected = copy.deepcopy(view)
    assert expected.nbytes > 32 * 2**20
    async with aiostage.AsyncStager() as stager:
        (staged,) = await stager.stage([view])
    assert staged.stride() == expected.stride()
    assert torch.equal(staged, expected)
