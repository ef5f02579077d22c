"""Cells of a notebook await aiostage, or call its blocking face beside the kernel's running loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.patience import seconds

pytest.importorskip("ipykernel", reason="ipykernel is not installed, and not among the packages of the tests")
pytest.importorskip("jupyter_client", reason="jupyter_client is not installed")

ROOT = Path(__file__).parent.parent

CELLS = {
    "import asyncio, aiostage, aiostage.blocking, torch; tree = {'a': torch.arange(5.0)}": "",
    "stager = aiostage.AsyncStager(); (await stager.stage(tree))['a'].tolist()": "[0.0, 1.0, 2.0, 3.0, 4.0]",
    "(await aiostage.save(tree, 'saved')).leaves": "1",
    "(await aiostage.load('saved'))['a'].tolist()": "[0.0, 1.0, 2.0, 3.0, 4.0]",
    # Each cell is a task of its own.
    "checkpoints = aiostage.Checkpointer('run', keep=2); await checkpoints.open()": "",
    "await (await checkpoints.save(1, tree)).committed(); await checkpoints.steps()": "[1]",
    "await checkpoints.aclose(); await stager.aclose()": "",
    "aiostage.blocking.save(tree, 'blocking').leaves": "1",
    "aiostage.blocking.load('blocking')['a'].tolist()": "[0.0, 1.0, 2.0, 3.0, 4.0]",
}


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Any]:
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(cwd=str(tmp_path), env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.filterwarnings("ignore")
def test_cells(kernel: Any) -> None:
    for cell, expected in CELLS.items():
        shown: list[str] = []

        def note(message: dict[str, Any], shown: list[str] = shown) -> None:
            if message["msg_type"] == "execute_result":
                shown.append(message["content"]["data"]["text/plain"])

        reply = kernel.execute_interactive(cell, timeout=seconds(60), output_hook=note)
        assert reply["content"]["status"] == "ok", reply["content"]
        assert shown == ([expected] if expected else []), cell
