"""Every Python block in the documents runs, and so does every example."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import pytest

import aiostage
import aiostage.dcp
import aiostage.errors
from aiostage_command import __version__
from tests.parsing import parse
from tests.patience import seconds
from tests.warm import PYTHON, executable, imported

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>skip|needs): (?P<reason>.+?) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
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


def run_page(document: Path, package: str | None = None) -> None:
    """Run the blocks of a document that need no package, and those that need this one.

    In one namespace and on one event loop, as for a reader who types it in.
    """
    text = document.read_text()
    blocks = list(BLOCK.finditer(text))
    assert text.count("```python\n") == len(blocks), "a block is not closed"
    if "<!-- warnings of other packages are ignored -->" in text:
        warnings.simplefilter("ignore")

    async def main() -> None:
        namespace: dict[str, Any] = {"__name__": document.stem}
        for block in blocks:
            if block["mark"] is None or (block["mark"] == "needs" and block["reason"] == package):
                await run(block["code"], text.count("\n", 0, block.start("code")), document, namespace)

    anyio.run(main)


# Said by the profiler of PyTorch 2.11.
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(document)


def needed() -> list[tuple[Path, str]]:
    """Return the packages that blocks need beside those of the tests, each with its page."""
    return [
        (page, name)
        for page in DOCUMENTS
        for name in sorted({block["reason"] for block in BLOCK.finditer(page.read_text()) if block["mark"] == "needs"})
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("document", "package"), needed(), ids=lambda value: getattr(value, "name", value))
def test_blocks_run_that_need_a_package(document: Path, package: str, tmp_path: Path) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed, and not among the packages of the tests")
    # Such packages start processes, and change what they find in their own.
    outcome = subprocess.run(
        [sys.executable, "-m", "tests.test_docs", str(document), package],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=seconds(150),
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def shown(page: str, language: str) -> str:
    """Return the one block of a language that a page has."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    text: str = blocks[0]
    return text


@pytest.mark.parametrize(("status", "requeued"), [(75, "requeue 4711\n"), (0, ""), (1, "")])
def test_the_batch_script_starts_a_preempted_training_again(status: int, requeued: str, tmp_path: Path) -> None:
    for name, does in {"srun": f'echo "$@" > ran; exit {status}', "scontrol": 'echo "$@" > requeued'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o700)
    (tmp_path / "requeued").write_text("")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    script = ["bash", "-c", shown("clusters.md", "sh")]
    assert subprocess.run(script, cwd=tmp_path, env=environment, check=False).returncode == status
    assert (tmp_path / "ran").read_text() == "python preempted.py checkpoints\n"
    assert (tmp_path / "requeued").read_text() == requeued


def test_the_job_for_kubernetes_starts_a_preempted_training_again() -> None:
    yaml = pytest.importorskip("yaml", reason="the extra `docs` is not installed")
    job = yaml.safe_load(shown("clusters.md", "yaml"))["spec"]
    status = re.search(r"^PREEMPTED = (\d+)$", (ROOT / "examples" / "preempted.py").read_text(), re.MULTILINE)
    assert status is not None
    [ignored] = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert ignored == {"operator": "In", "values": [int(status[1])]}
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert pod["restartPolicy"] == "Never"
    assert container["command"][:2] == ["python", "preempted.py"]
    assert container["command"][2] in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}


def test_the_table_and_the_pictures_show_the_figures_that_were_kept() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    pictures = {name: (ROOT / "docs" / "pictures" / f"{name}.svg").read_text() for name in ("staging", "saves")}
    figures = {name: json.loads((ROOT / "benchmarks" / "figures" / f"{name}.json").read_text()) for name in pictures}
    rows = figures["staging"]["rows"]
    medians = [f"{1e3 * sorted(each['seconds'])[1]:.0f}" for row in rows for each in row["samples"].values()]
    # Four peers in five rows, unless one did not run.
    assert len(medians) >= 16
    for median in medians:
        assert f"| {median} ms |" in page
        assert re.search(rf">{median}</text>", pictures["staging"])
    for save in figures["saves"]["disk"]:
        assert f">{save['way']}</text>" in pictures["saves"]
        assert f">{save['found'][0]['committed']:.2f}</text>" in pictures["saves"]


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


@cache
def parsed(module: Path) -> ast.Module:
    return parse(module.read_text())


@cache
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
    for statement in parsed(module).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(statement.value)
            return names
    return []


@cache
def source_of(module: str, name: str) -> tuple[str, str]:
    """Return the module that defines a name which a module exports, and its name there."""
    steps = ROOT.joinpath(*module.split("."))
    path = steps / "__init__.py" if steps.is_dir() else steps.with_suffix(".py")
    for statement in ast.walk(parsed(path)):
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("aiostage"):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return source_of(str(statement.module), alias.name)
    return module, name


@cache
def directives() -> list[tuple[str, str]]:
    """Return the names of which docs/reference.md shows the docstring, each as a module and a name in it."""
    text = (ROOT / "docs" / "reference.md").read_text()
    return [(module, name) for module, name in re.findall(r"^::: ([\w.]+)\.(\w+)$", text, re.MULTILINE)]


@pytest.mark.parametrize("name", sorted(public_modules()))
def test_the_reference_has_every_public_name(name: str) -> None:
    shown = {source_of(*each) for each in directives()}
    missing = [each for each in exported(public_modules()[name]) if source_of(name, each) not in shown]
    assert not missing, f"docs/reference.md lacks the line '::: {name}.{missing[0]}', and {missing[1:]} of {name}"


def test_the_reference_shows_each_name_once_and_no_others() -> None:
    shown = [source_of(*each) for each in directives()]
    assert len(shown) > 100
    assert len(shown) == len(set(shown)), [each for each in shown if shown.count(each) > 1]
    for module, name in directives():
        assert name in exported(public_modules()[module]), f"docs/reference.md: {module} does not export {name}"


def test_the_reference_lists_every_error() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    missing = [name for name in aiostage.errors.__all__ if f"| `{name}` |" not in text]
    assert not missing, f"the table of errors in docs/reference.md does not have {missing}"


def definition(module: str, name: str) -> ast.AST | None:
    """Return the class or function of a name; None for other values."""
    for statement in parsed(ROOT.joinpath(*module.split(".")).with_suffix(".py")).body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and statement.name == name:
            return statement
    return None


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    found = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    extra = [each for each in (function.args.vararg, function.args.kwarg) if each is not None]
    return [each.arg for each in (*found, *extra) if each.arg not in ("self", "cls") and not each.arg.startswith("_")]


def unsaid(node: ast.AST | None) -> list[str]:
    """Return what the docstrings of a class or function leave out: parameters, fields, or themselves."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        text, names = ast.get_docstring(node) or "", parameters(node)
        return [node.name] * (not text) + [each for each in names if not re.search(rf"\b{each}\b", text)]
    if not isinstance(node, ast.ClassDef):
        return []
    text, missing = ast.get_docstring(node) or "", []
    for number, member in enumerate(node.body):
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            field, after = member.target.id, node.body[number + 1 : number + 2]
            has_own = bool(after) and isinstance(after[0], ast.Expr) and isinstance(after[0].value, ast.Constant)
            if not (field.startswith("_") or has_own or re.search(rf"\b{field}\b", text)):
                missing.append(field)
        elif isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
            # What is not made by its users, such as a handle, says nothing of how it is made.
            if member.name == "__init__" and "Args:" in text:
                missing += [each for each in parameters(member) if not re.search(rf"\b{each}\b", text)]
            elif not member.name.startswith(("_", "test_")) and ast.get_docstring(member) is None:
                missing.append(member.name)
    return [node.name] * (not text) + missing


@pytest.mark.parametrize(("module", "name"), directives(), ids=lambda value: value)
def test_the_docstrings_of_the_reference_are_complete(module: str, name: str) -> None:
    module, name = source_of(module, name)
    if (ROOT.joinpath(*module.split("."))).is_dir():
        module += ".__init__"
    missing = unsaid(definition(module, name))
    assert not missing, f"the docstrings of {module} do not say what {missing} are"


def test_public_modules_are_found() -> None:
    assert {"aiostage", "aiostage.checkpoint.verify", "aiostage.integrations.tqdm"} <= set(public_modules())
    assert "aiostage.checkpoint.writer" not in public_modules()
    for module in (aiostage, aiostage.dcp):
        assert set(exported(public_modules()[module.__name__])) == set(module.__all__)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds(170), check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    reference = (tmp_path / "reference.html").read_text()
    missing = [f"{module}.{name}" for module, name in directives() if f'id="{module}.{name}"' not in reference]
    assert not missing, f"the page lacks {missing}"
    assert not re.search(r":(?:class|func|meth):`|<autoref", reference)
    assert __version__ in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("name", aiostage.__all__)
def test_an_example_uses_every_public_name(name: str) -> None:
    used = re.compile(rf"\b{name}\b")
    assert any(used.search(example.read_text()) for example in (ROOT / "examples").rglob("*.py"))


AS_A_SCRIPT = """
import multiprocessing, os, runpy, sys, warnings
warnings.simplefilter("error", RuntimeWarning)
sys.executable = sys.argv[1]
multiprocessing.set_executable(sys.executable)
del sys.argv[:2]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    """What the examples find as ``sys.executable``: their processes begin with what most of them import."""
    # The first optimizer imports torch._dynamo, in more than a second.
    with imported("sklearn.datasets", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.launcher"):
        yield executable()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_runs(example: Path, python: str, tmp_path: Path) -> None:
    changed = {
        "AIOSTAGE_EXAMPLE_QUICK": "1",
        "OMP_NUM_THREADS": "1",
        # What lies beside the interpreter, such as a server.
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        # What torchrun starts.
        "PYTHON_EXEC": python,
    }
    outcome = subprocess.run(
        [*PYTHON, "-c", AS_A_SCRIPT, python, str(example)],
        cwd=tmp_path,
        env=os.environ | changed,
        capture_output=True,
        text=True,
        timeout=seconds(170),
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert not list(tmp_path.iterdir()), "the example leaves files behind"


if __name__ == "__main__":
    run_page(Path(sys.argv[1]), sys.argv[2])
