"""A process that may open 64 files reads checkpoints of more, and of more than it may open."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

from tests.patience import seconds
from tests.warm import PYTHON

PROGRAM = """
    import asyncio, resource, sys
    import torch
    import aiostage

    async def main():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        tree = {f"t{number}": torch.full((8,), number) for number in range(100)}
        await aiostage.save(tree, sys.argv[1] + "/many", max_shard_bytes=64)
        for options in ({}, {"verify": False}, {"device": "meta"}):
            loaded = await aiostage.load(sys.argv[1] + "/many", **options)
            assert options.get("device") or all(torch.equal(loaded[name], tree[name]) for name in tree)
        big = torch.zeros(100, 1 << 18)
        async with aiostage.Checkpointer(sys.argv[1] + "/run", incremental=True) as checkpoints:
            for step in range(90):
                big[step] = step + 1
                await checkpoints.save(step, {"big": big})
        assert torch.equal((await checkpoints.restore())["big"], big)

    asyncio.run(main())
"""


def test_few_descriptors(tmp_path: Path) -> None:
    program = [*PYTHON, "-c", textwrap.dedent(PROGRAM), str(tmp_path)]
    outcome = subprocess.run(program, capture_output=True, text=True, timeout=seconds(100), check=False)
    assert outcome.returncode == 0, outcome.stderr
