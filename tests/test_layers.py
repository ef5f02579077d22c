"""The house: a module imports only from rows above its own, and never from a sibling of its row."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import aiostage
from tests.parsing import parse

ROWS = [
    {"_extras", "errors", "_warnings"},
    {"_arguments"},
    {"_private"},
    {"_platform"},
    {"options", "leaf"},
    {"abc"},
    {"_loop"},
    {"format"},
    {"observe"},
    {"_memory", "_device", "_capture"},
    {"_copy"},
    {"snapshot", "sharing", "storage"},
    {"stager", "incremental"},
    {"checkpoint"},
    {"weights"},
    {"blocking", "dcp", "testing"},
    {"integrations", "cli"},
    {"__main__"},
]
ROW = {name: number for number, row in enumerate(ROWS) for name in row}
# Storage moves bytes; it must not know how they were staged.
LOWEST_FOR_STORAGE = ROW["observe"]
# Paths know nothing of options, but options are written in terms of paths.
ALLOWED = {("options", "leaf")}

ROOT = Path(aiostage.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def space_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def names_only_private(path: Path) -> bool:
    """Return whether all that a file imports from the package itself is the module of private names."""
    nodes = [node for node in ast.walk(parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return all([alias.name for alias in node.names] == ["_private"] for node in nodes if node.module == "aiostage")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_upwards(path: Path) -> None:
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert here in ROW, f"{here} has no row: the house needs one for it"
    for module in imports(path):
        if not module.startswith("aiostage."):
            assert module != "aiostage" or names_only_private(path), f"{path} imports the package instead of a module"
            continue
        there = space_of(module)
        if there == here or (here, there) in ALLOWED:
            continue
        assert ROW[there] < ROW[here], f"{path} imports {module}, which is not above it"
        if here == "storage":
            assert ROW[there] <= LOWEST_FOR_STORAGE, f"{path} imports {module}, of which storage knows nothing"


@pytest.mark.parametrize("path", sorted((ROOT / "_loop").glob("*.py")), ids=lambda path: path.name)
def test_the_loop_knows_no_torch(path: Path) -> None:
    assert not any(module.split(".")[0] == "torch" for module in imports(path))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_cuda_is_reached_through_a_backend(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] not in ("_device", "testing"):
        assert "torch.cuda." not in path.read_text()
