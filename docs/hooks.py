"""What the site needs beyond MkDocs: pages from outside of docs/, the version, and the roles of our docstrings."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "examples/orchestrator/README.md")
"""What pages link to and is not in docs/; of examples all programs come with them."""

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([\w.]+)`")


def on_config(config: MkDocsConfig) -> None:
    """Show the version beside the name; a menu of all versions where mike publishes this one beside others."""
    if "MIKE_DOCS_VERSION" in os.environ:
        config.extra["version"] = {"provider": "mike", "alias": True}
        return
    version = runpy.run_path(str(ROOT / "aiostage_command.py"), run_name="version")["__version__"]
    config.site_name = f"{config.site_name} {version}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of docs/ under the name that it has from the root."""
    examples = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "examples").rglob("*.py"))]
    for name in (*OUTSIDE, *examples):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to where the files are on the site: docs/ is its root, and so is what docs/ lies in."""
    name = page.file.src_uri
    if name in OUTSIDE:
        return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
    return markdown.replace("](../", "](")


class Roles(griffe.Extension):
    """Make links of Sphinx's roles, in which the docstrings refer to each other, where the target is on the site."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Go through all docstrings of a package, once all names in it can be looked up."""
        self._go_through(pkg)

    def _go_through(self, place: griffe.Object) -> None:
        if place.docstring is not None:
            text = _ROLE.sub(lambda match: self._link(place, match[1]), place.docstring.value)
            place.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
        for member in place.members.values():
            if isinstance(member, griffe.Object):
                self._go_through(member)

    @staticmethod
    def _link(place: griffe.Object, name: str) -> str:
        try:
            target = place.resolve(name)
        except griffe.NameResolutionError:
            target = name
        return f'<autoref identifier="{target}" optional><code>{name.rpartition(".")[2]}</code></autoref>'
