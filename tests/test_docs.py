"""Every Python block in the documents runs, and so does every example."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import anyio
import pytest

import aiostage
import aiostage.abc
import aiostage.checkpoint.progress
import aiostage.dcp
import aiostage.observe
import aiostage.sharing
import aiostage.testing
import aiostage.weights
from tests.patience import seconds

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"(?:<!-- skip: (?P<reason>.+?) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


async def run(code: str, line: int, document: Path, namespace: dict[str, Any]) -> None:
    """Run one block, in which ``await`` may stand at the top level."""
    compiled = compile(
        "\n" * line + code, str(document), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
    )
    if not compiled.co_flags & inspect.CO_COROUTINE:
        # Nothing to await: it may block, and it may want to start an event loop of its own.
        await anyio.to_thread.run_sync(eval, compiled, namespace)
        return
    await eval(compiled, namespace)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = document.read_text()
    blocks = list(BLOCK.finditer(text))
    assert text.count("```python\n") == len(blocks), "a block is not closed"
    monkeypatch.chdir(tmp_path)
    if "<!-- warnings of other packages are ignored -->" in text:
        warnings.simplefilter("ignore")

    async def main() -> None:
        # One namespace and one event loop for a document, as for a reader who types it in.
        namespace: dict[str, Any] = {"__name__": document.stem}
        for block in blocks:
            if block["reason"] is None:
                await run(block["code"], text.count("\n", 0, block.start("code")), document, namespace)

    anyio.run(main)


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target, anchor in LINK.findall(document.read_text()):
        path = document.parent / target if target else document
        assert path.exists(), f"{document.name} links to {target}"
        if anchor:
            anchors = {
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                for heading in HEADING.findall(path.read_text())
            }
            assert anchor in anchors, f"{document.name} links to #{anchor}, which {path.name} does not have"


def test_every_page_can_be_reached_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    reached, pages = {index}, [index]
    while pages:
        page = pages.pop()
        linked = {(page.parent / target).resolve() for target, _ in LINK.findall(page.read_text()) if target}
        new = {target for target in linked if target.suffix == ".md"} - reached
        reached |= new
        pages += new
    assert set(DOCUMENTS[1:]) <= reached, f"docs/index.md does not lead to {set(DOCUMENTS[1:]) - reached}"


def test_the_map_names_what_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawing = (ROOT / "docs" / "pictures" / "architecture.svg").read_text()
    named = re.findall(r"`([\w./]+(?:/|\.py|\.md))`", text) + re.findall(
        r"(?<![\w/.])[a-z_][\w/]*(?:/|\.py)(?![\w>])", drawing
    )
    assert len(named) > 80
    for name in named:
        root = ROOT if name.startswith(("tests/", "docs/")) else ROOT / "aiostage"
        assert (root / name).exists(), f"docs/architecture.md or its drawing names {name}"
    here = {path.name for path in (ROOT / "aiostage").iterdir() if path.name not in ("__init__.py", "__main__.py")}
    there = {name.strip("/").partition("/")[0] for name in named}
    missing = {name for name in here if name != "py.typed" and not name.startswith("__")} - there
    assert not missing, f"docs/architecture.md does not say what {missing} are"
    definitions = re.findall(r"`(\w+)`\s(?:in|of)\s+`([\w/]+\.py)`", text)
    assert len(definitions) > 5
    for name, file in definitions:
        defined = re.compile(rf"^(?:class |def |async def )?{name}\b", re.MULTILINE)
        assert defined.search((ROOT / "aiostage" / file).read_text()), f"{file} does not define {name}"


def sections(text: str) -> dict[str, str]:
    """Return what stands below each heading that is a name."""
    heading = re.compile(r"^### `(\w+)`$", re.MULTILINE)
    places = [(match[1], match.end()) for match in heading.finditer(text)]
    ends = [match.start() for match in re.finditer(r"^##", text, re.MULTILINE)]
    return {name: text[place : min((end for end in ends if end > place), default=None)] for name, place in places}


def public_modules() -> dict[str, Path]:
    """Return the modules that people may import from, and the files that they are in."""
    texts = [path.read_text() for path in (*DOCUMENTS, *EXAMPLES)]
    imported = {name for text in texts for name in re.findall(r"^ *from (aiostage[\w.]*) import", text, re.MULTILINE)}
    found = {}
    for path in (ROOT / "aiostage").rglob("*.py"):
        steps = path.relative_to(ROOT).with_suffix("").parts
        is_package = steps[-1] == "__init__"
        name = ".".join(steps[:-1] if is_package else steps)
        if any(step.startswith("_") for step in name.split(".")):
            continue
        if is_package or len(steps) == 2 or steps[1] == "integrations" or name in imported:
            found[name] = path
    return found


def exported(module: Path) -> list[str]:
    """Return the names that a module exports, without importing it: some need packages that are not installed."""
    for statement in ast.parse(module.read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(statement.value)
            return names
    return []


@pytest.mark.parametrize("name", sorted(public_modules()))
def test_the_reference_has_every_public_name(name: str) -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    module = public_modules()[name]
    missing = [each for each in exported(module) if not re.search(rf"(`([\w.]*\.)?|await |with ){each}[`(]", text)]
    assert not missing, f"docs/reference.md does not say what {missing} of {name} are"


def test_public_modules_are_found() -> None:
    assert {"aiostage", "aiostage.checkpoint.verify", "aiostage.integrations.tqdm"} <= set(public_modules())
    assert "aiostage.checkpoint.writer" not in public_modules()
    for module in (aiostage, aiostage.dcp):
        assert set(exported(public_modules()[module.__name__])) == set(module.__all__)


@pytest.mark.parametrize(
    "module",
    [
        aiostage,
        aiostage.abc,
        aiostage.checkpoint.progress,
        aiostage.observe,
        aiostage.sharing,
        aiostage.testing,
        aiostage.weights,
    ],
    ids=lambda module: module.__name__,
)
def test_the_sections_of_the_reference_are_complete(module: Any) -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    for name, section in sections(text).items():
        value = getattr(module, name, None)
        if (
            inspect.isfunction(value)
            or dataclasses.is_dataclass(value)
            or value in (aiostage.AsyncStager, aiostage.Checkpointer)
        ):
            unsaid = [each for each in inspect.signature(value).parameters if not re.search(rf"\b{each}\b", section)]
            assert not unsaid, f"the section of {name} in docs/reference.md does not say what {unsaid} are"
        if not inspect.isclass(value) or not value.__module__.startswith("aiostage"):
            continue
        members = [member for member in vars(value) if not member.startswith(("_", "test_"))]
        missing = [member for member in members if not re.search(rf"\b{member}\b", section)]
        assert not missing, f"the section of {name} in docs/reference.md does not say what {missing} are"


@pytest.mark.parametrize("name", aiostage.__all__)
def test_an_example_uses_every_public_name(name: str) -> None:
    used = re.compile(rf"\b{name}\b")
    assert any(used.search(example.read_text()) for example in (ROOT / "examples").rglob("*.py"))


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
        timeout=seconds(170),
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert not list(tmp_path.iterdir()), "the example leaves files behind"
