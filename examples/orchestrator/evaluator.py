"""Scores the weights of running trainers, in a process of its own and without a copy of them.

It opens each staged tree through its shared-memory handle, says so, and only then computes: the trainer may drop its
own reference as soon as the tree is open.
"""

from __future__ import annotations

import asyncio
import base64
import pickle

import torch
from protocol import messages, send, standard_input
from training import Digits, evaluate

import aiostage


async def main() -> None:
    torch.set_num_threads(1)
    digits = Digits()
    send("ready")
    async for command in messages(await standard_input()):
        job, step = command["job"], command["step"]
        try:
            # Handles come from our own trainers, through our own service: unpickling one is as safe as they are.
            weights = pickle.loads(base64.b64decode(command["handle"])).open()
        except aiostage.HostMemoryError as error:
            # The trainer has died or gone on; there will be others.
            send("missed", job=job, step=step, reason=str(error))
            continue
        send("opened", job=job, step=step)
        loss, accuracy = await asyncio.to_thread(evaluate, weights, digits)
        del weights
        send("score", job=job, step=step, loss=loss, accuracy=accuracy)


if __name__ == "__main__":
    asyncio.run(main())
