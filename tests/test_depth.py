"""A reader can follow what a stage, saves and a load do: they pass through few files, in stacks that are not deep."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.patience import seconds

CEILINGS = {
    # files, functions, classes, frames. To be lowered whenever less is reached; which functions are entered depends a
    # little on who waits for whom, hence a few more than were seen.
    "stage": (18, 263, 48, 13),
    "save": (34, 467, 64, 15),
    "incremental save": (42, 540, 75, 15),
    "load": (25, 239, 25, 14),
}


@pytest.mark.timeout(120)
def test_how_much_of_the_package_is_entered() -> None:
    # A process of its own: threads that other tests have started are not profiled.
    # Up to three times: under load a call waits where it otherwise does not, and enters a function or two more.
    for _ in range(3):
        run = subprocess.run([sys.executable, "-m", "tests.depth"], capture_output=True, text=True, timeout=seconds(35))
        assert run.returncode == 0, run.stderr
        depths = json.loads(run.stdout)
        if all(depths[name]["functions"] <= ceiling[1] for name, ceiling in CEILINGS.items()):
            break
    assert depths.keys() == CEILINGS.keys()
    for name, (files, functions, classes, frames) in CEILINGS.items():
        depth = depths[name]
        # It measures something: the loop's thread and a worker's.
        assert "_loop/workers.py" in depth["files"]
        assert len(depth["files"]) <= files, f"{name} passes through {depth['files']}"
        assert depth["functions"] <= functions, name
        assert depth["classes"] <= classes, name
        assert depth["frames"] <= frames, f"{name} is as deep as {depth['deepest']}"
    assert {"_capture/walk.py", "_copy/host.py", "_loop/coroutines.py"} <= set(depths["stage"]["files"])
    assert "format/encode.py" in depths["save"]["files"]
    assert not any(file.startswith("incremental/") for file in depths["save"]["files"])
    assert {"incremental/writing.py", "incremental/references.py"} <= set(depths["incremental save"]["files"])
    assert "format/decode.py" in depths["load"]["files"]
