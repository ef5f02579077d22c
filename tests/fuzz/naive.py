"""Stagers that look right and are not: what finds torn copies has to find theirs."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import numpy
import torch

from aiostage.abc import CheckpointStager
from aiostage.errors import TornSnapshotError
from tests.fuzz.classes import Marked

__all__ = ["Aliased", "SkewedVersions", "Unwitnessed"]


class _Naive(CheckpointStager):
    """Copies containers while it walks, with a turn of the loop after each, then tensors."""

    versions_skewed = True

    async def stage(self, state_dict: Any) -> Any:
        self.memo: dict[int, Any] = {}
        self.tensors: list[torch.Tensor] = []
        self.noted: list[int] = []
        result = await self.walk(state_dict)
        if self.versions_skewed:
            self.noted = [tensor._version for tensor in self.tensors]
        for tensor in self.tensors:
            if tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
                continue
            with torch.no_grad():
                self.memo[id(tensor)].set_(copy.deepcopy(tensor.detach()))
        await asyncio.sleep(0)
        if [tensor._version for tensor in self.tensors] != self.noted:
            raise TornSnapshotError(["a tensor"])
        return result

    async def walk(self, item: Any) -> Any:
        if id(item) in self.memo:
            return self.memo[id(item)]
        await asyncio.sleep(0)
        if isinstance(item, torch.Tensor):
            made = item.clone() if type(item) is Marked else copy.deepcopy(item)
            self.tensors.append(item)
            self.noted.append(item._version)
        elif type(item) is dict:
            made = {}
            self.memo[id(item)] = made
            for key, value in list(item.items()):
                made[key] = await self.walk(value)
        elif type(item) is list:
            made = []
            self.memo[id(item)] = made
            for value in list(item):
                made.append(await self.walk(value))
        else:
            made = copy.deepcopy(item)
        self.memo[id(item)] = made
        return made

    async def aclose(self) -> None:
        return


class SkewedVersions(_Naive):
    """Reads versions after its walk."""


class Unwitnessed(_Naive):
    """Reads versions as it walks, and copies at once what shows no changes."""

    versions_skewed = False


class Aliased(Unwitnessed):
    """Takes arrays for values."""

    async def walk(self, item: Any) -> Any:
        return item if isinstance(item, numpy.ndarray) else await super().walk(item)
