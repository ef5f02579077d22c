"""An error about a missing optional package says what to install, in one form."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import aiostage
from aiostage import storage
from aiostage._extras import EXTRAS, needed_for

WAYS: list[tuple[str, str, Callable[[], Any]]] = [
    ("aiostage.storage.objects", "obstore", lambda: storage.storage_at("s3://bucket/runs")),
    ("aiostage.storage.objects", "obstore", lambda: storage.ObjectStorage),
    *(
        (module, package, partial(import_module, module))
        for module, package in (
            ("aiostage.integrations.lightning", "pytorch_lightning"),
            ("aiostage.integrations.opentelemetry", "opentelemetry"),
            ("aiostage.integrations.tqdm", "tqdm"),
            ("aiostage.integrations.transformers", "transformers"),
        )
    ),
]


def remove(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let a package not be installed."""
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(("module", "package", "way"), WAYS)
def test_what_to_install_is_said(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str, way: Callable[[], Any]
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    remove(monkeypatch, package)
    said = rf" needs the package {package}\. Install it with: pip install 'aiostage\[{EXTRAS[package]}\]'$"
    with pytest.raises(ModuleNotFoundError, match=said) as caught:
        way()
    assert (caught.value.name or "").startswith(package)


@pytest.mark.asyncio
async def test_it_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "aiostage.integrations.tqdm", raising=False)
    remove(monkeypatch, "tqdm")
    with pytest.raises(ModuleNotFoundError, match=r"^the bar of progress=True needs the package tqdm\."):
        await aiostage.save({}, tmp_path / "checkpoint", progress=True)
    remove(monkeypatch, "fsspec")
    with pytest.raises(ModuleNotFoundError, match=r"^hf://datasets/a needs the package fsspec\."):
        await aiostage.save({}, "hf://datasets/a/b")
    assert not list(tmp_path.iterdir())


def test_what_a_package_itself_lacks_is_its_own_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(ModuleNotFoundError, match=r"^import of xxhash halted"), needed_for("this"):
        import_module("xxhash")


def test_the_extras_are_there() -> None:
    project = tomllib.loads(Path(__file__).parent.parent.joinpath("pyproject.toml").read_text())["project"]
    for package, extra in EXTRAS.items():
        named = {re.split("[^a-z-]", need)[0] for need in project["optional-dependencies"][extra]}
        assert named & {package.replace("_", "-"), f"{package}-api"}


def test_the_oldest_that_is_tested_is_the_oldest_that_is_allowed() -> None:
    root = Path(__file__).parent.parent
    project = tomllib.loads(root.joinpath("pyproject.toml").read_text())["project"]
    for_development = {"test", "docs", "bench"}
    extras = [needs for name, needs in project["optional-dependencies"].items() if name not in for_development]
    allowed = set()
    for need in [*project["dependencies"], *(need for needs in extras for need in needs)]:
        requirement = Requirement(need)
        if requirement.name != project["name"]:
            (oldest,) = requirement.specifier
            assert oldest.operator == ">=", need
            # A release of two numbers is pinned with three.
            allowed.add((requirement.name, (*Version(oldest.version).release, 0)[:3]))
    lines = root.joinpath("constraints-oldest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert allowed == {(pin.name, Version(str(pin.specifier)[2:]).release) for pin in pins}
