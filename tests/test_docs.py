"""Every Python block in the documents runs, and so does every example."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"(?:<!-- skip: (?P<reason>.+?) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


async def run(code: str, line: int, document: Path, namespace: dict[str, Any]) -> None:
    """Run one block, in which ``await`` may stand at the top level."""
    compiled = compile("\n" * line + code, str(document), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if "asyncio.run(" in code:
        # A whole program, which wants to start an event loop of its own.
        await anyio.to_thread.run_sync(eval, compiled, namespace)
        return
    outcome = eval(compiled, namespace)
    if inspect.isawaitable(outcome):
        await outcome


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = document.read_text()
    blocks = list(BLOCK.finditer(text))
    assert text.count("```python\n") == len(blocks), "a block is not closed"
    monkeypatch.chdir(tmp_path)

    async def main() -> None:
        # One namespace and one event loop for a document, as for a reader who types it in.
        namespace: dict[str, Any] = {"__name__": document.stem}
        for block in blocks:
            if block["reason"] is None:
                await run(block["code"], text.count("\n", 0, block.start("code")), document, namespace)

    anyio.run(main)


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target, _ in LINK.findall(document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_runs(example: Path, tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", str(example)],
        cwd=tmp_path,
        env=os.environ | {"AIOSTAGE_EXAMPLE_QUICK": "1"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert not list(tmp_path.iterdir()), "the example leaves files behind"
