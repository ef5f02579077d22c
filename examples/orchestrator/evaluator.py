"""Scores the weights of running trainers, in a process of its own and without a copy of them.

It opens each staged tree through its shared-memory handle, says so, and only then computes: the trainer may drop its
own reference as soon as the tree is open.
"""

from __future__ import annotations

import asyncio
import base64
import json
import pickle

import torch
from protocol import Channel
from training import Digits, evaluate

import aiostage


async def main() -> None:
    torch.set_num_threads(1)
    digits = Digits()
    service = await Channel.to_service()
    service.tell("ready")
    async for line in service.lines():
        command = json.loads(line)
        job, step = command["job"], command["step"]
        try:
            # Handles come from our own trainers, through our own service: unpickling one is as safe as they are.
            weights = pickle.loads(base64.b64decode(command["handle"])).open()
        except aiostage.HostMemoryError as error:
            # The trainer has died or gone on; there will be others.
            service.tell("missed", job=job, step=step, reason=str(error))
            continue
        service.tell("opened", job=job, step=step)
        loss, accuracy = await asyncio.to_thread(evaluate, weights, digits)
        del weights
        service.tell("score", job=job, step=step, loss=loss, accuracy=accuracy)
    await service.aclose()


if __name__ == "__main__":
    asyncio.run(main())
