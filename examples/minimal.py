"""The smallest program: a staged copy, made beside the event loop, that training no longer changes."""

import asyncio

import torch

from aiostage import AsyncStager


async def main() -> None:
    model = torch.nn.Linear(1000, 1000)
    async with AsyncStager() as stager:
        staged = await stager.stage(model.state_dict())
        torch.nn.init.zeros_(model.weight)  # training goes on
        print(f"live {model.weight.abs().max().item():.4f}, staged {staged['weight'].abs().max().item():.4f}")


asyncio.run(main())
