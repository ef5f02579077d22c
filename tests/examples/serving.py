"""The orchestrator with children that need no PyTorch.

``--broken FILE`` makes the supervision itself fail once there is such a file.
"""

from __future__ import annotations

import functools
import runpy
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ORCHESTRATOR = HERE.parent.parent / "examples" / "orchestrator"

sys.path.insert(0, str(ORCHESTRATOR))

import supervisor  # noqa: E402

if "--broken" in sys.argv:
    position = sys.argv.index("--broken")
    wanted = Path(sys.argv[position + 1])
    del sys.argv[position : position + 2]
    handle = supervisor.Supervisor._handle

    def broken(self: Any, job: Any, event: Any) -> None:
        handle(self, job, event)
        if wanted.exists():
            raise LookupError("a fault of the supervisor")

    supervisor.Supervisor._handle = broken

supervisor.MOST_JOBS = 14
supervisor.Settings = functools.partial(
    supervisor.Settings, max_restarts=1, backoff=0.05, worker=HERE / "child.py", evaluator=HERE / "child.py"
)
runpy.run_path(str(ORCHESTRATOR / "__main__.py"), run_name="__main__")
