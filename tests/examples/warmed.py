"""The orchestrator whose workers are forks of a process that has imported what they need: see `tests.warm`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from tests.warm import PYTHON

ORCHESTRATOR = Path(__file__).parents[2] / "examples" / "orchestrator"

sys.path.insert(0, str(ORCHESTRATOR))

import process  # noqa: E402

start = process.asyncio.create_subprocess_exec


async def start_warm(executable: str, *arguments: str, **options: Any) -> Any:
    assert executable == sys.executable
    return await start(*PYTHON, *arguments, **options)


process.asyncio.create_subprocess_exec = start_warm
runpy.run_path(str(ORCHESTRATOR / "__main__.py"), run_name="__main__")
