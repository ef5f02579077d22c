"""Which parts of a checkpoint are wanted: what ``only=`` chooses of a table of nodes, or of another program's tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from typing import Any, TypeAlias

from aiostage._loop.workers import release_gil, releasing_gil
from aiostage.errors import listed, shown
from aiostage.format.nodes import LOOKED_INTO, NodeTable, path_step
from aiostage.leaf import LinkedPath, Path, unlinked

__all__ = ["Only", "Selection"]

_EXAMPLES = 5
_MAX_DEPTH = 100
"""Levels of a tree of another program that are looked into; what is deeper is taken as a whole or not at all."""

_MAX_PATHS = 1 << 22
"""Paths in a tree of another program that are looked at: more than a manifest of aiostage has nodes. A hostile file can
have 2 ** 100 paths, with lists each of which contains the next one twice."""

_NOTHING = object()

Only: TypeAlias = str | Iterable[str] | Callable[[Path], bool]
"""Patterns of paths with dots between their steps, or a function of a path."""


class Selection:
    """What the user wants of a tree. What is chosen is taken with all that is below it.

    Args:
        only: Patterns as ``fnmatch`` knows them, against paths such as ``model.layers.0.weight``; or a function that is
            called with the path of each container and each leaf, and returns whether it is wanted.
        where: The checkpoint, for errors.

    Raises:
        TypeError: If it is neither.
        ValueError: If there is no pattern.
    """

    def __init__(self, only: Only, where: str = "") -> None:
        self.where = f" {where}" if where else ""
        self._function: Callable[[Path], bool] | None = None
        self._patterns: dict[str, re.Pattern[str]] = {}
        self._unmatched: set[str] = set()
        self._examples: list[str] = []
        self._paths = 0
        if callable(only):
            self._function = only
            return
        patterns: list[str] = []
        if isinstance(only, Iterable):
            patterns = [only] if isinstance(only, str) else list(only)
        if not isinstance(only, Iterable) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"only must be patterns or a function of a path, not {shown(only)}")
        if not patterns:
            raise ValueError("only=[] selects nothing; None selects everything")
        self._patterns = {pattern: re.compile(translate(pattern)) for pattern in patterns}
        self._unmatched = set(patterns)

    def chooses(self, path: Path) -> bool:
        """Return whether what is at a path is wanted, and all below it."""
        text = ".".join(map(str, path)) if self._patterns or len(self._examples) < _EXAMPLES else ""
        if len(self._examples) < _EXAMPLES and text not in self._examples:
            self._examples.append(text)
        if self._function is not None:
            return bool(self._function(path))
        chosen = False
        for pattern, compiled in self._patterns.items():
            if compiled.match(text):
                chosen = True
                self._unmatched.discard(pattern)
        return chosen

    def prune(self, table: NodeTable, instead: object) -> None:
        """Leave out of a table what is not wanted.

        Of a container that is reached by several paths, the first counts.

        Args:
            table: Changed in place. From dicts what is not wanted vanishes.
            instead: Stands for it in lists and tuples, where places count.

        Raises:
            ValueError: If nothing is wanted, or a pattern matches nothing.
        """
        _Pruning(table, self, instead).run()
        if self._unmatched:
            # A pattern that matches only below what was chosen as a whole has not met its path yet, and is no error.
            self._select_below(table)
        self.check_matched()

    def prune_tree(self, tree: Any, instead: object) -> Any:
        """Return what is wanted of a tree of dicts, lists and tuples, as new containers.

        Args:
            tree: Not changed.
            instead: Stands for what is not wanted in lists and tuples.

        Raises:
            ValueError: If nothing is wanted, or a pattern matches nothing.
        """
        kept = self._kept(tree, (), instead, set())
        self.check_matched()
        if kept is _NOTHING:
            raise self.nothing_chosen()
        return kept

    def _kept(self, value: Any, path: Path, instead: object, above: set[int]) -> Any:
        if not isinstance(value, (dict, list, tuple)) or id(value) in above or len(path) >= _MAX_DEPTH:
            return _NOTHING
        found: dict[Any, Any] = {}
        for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
            self._paths += 1
            if self._paths > _MAX_PATHS:
                raise ValueError(
                    f"only= selects parts of trees of up to {_MAX_PATHS} paths, and the checkpoint{self.where} has "
                    "more. Load it without only=."
                )
            here = (*path, key)
            kept = child
            if self.chooses(here):
                if self._unmatched:
                    # For its side effect on the patterns: one that matches only below what was chosen has matched too.
                    self._kept(child, here, instead, above | {id(value)})
            else:
                kept = self._kept(child, here, instead, above | {id(value)})
            if kept is not _NOTHING:
                found[key] = kept
            release_gil()
        if not found:
            return _NOTHING
        if isinstance(value, dict):
            return found
        items = [found.get(place, instead) for place in range(len(value))]
        return tuple(items) if isinstance(value, tuple) else items

    def check_matched(self) -> None:
        """Raise a ValueError if a pattern has matched nothing so far."""
        if self._unmatched:
            raise ValueError(
                f"only={listed(sorted(map(shown, self._unmatched)))} matches nothing in the checkpoint{self.where}. "
                f"Its first paths are {', '.join(self._examples)}."
            )

    def nothing_chosen(self) -> ValueError:
        """Return the error for a function that has chosen nothing."""
        return ValueError(
            f"only= selects nothing of the checkpoint{self.where}. Its first paths are {', '.join(self._examples)}."
        )

    def _select_below(self, table: NodeTable) -> None:
        """Match the paths of all that is kept."""
        root = table.node(table.root)
        pending: list[tuple[int, LinkedPath]] = [(root, None)] if root is not None else []
        seen: set[int] = set()
        while pending and self._unmatched:
            index, place = pending.pop()
            if index in seen or table.forms[index]["is"] not in LOOKED_INTO:
                continue
            seen.add(index)
            for key, child in table.edges(index):
                here = (path_step(key), place)
                self.chooses(unlinked(here))
                node = table.node(child)
                if node is not None:
                    pending.append((node, here))
                release_gil()


class _Pruning:
    """Finds out what is kept of a table, and keeps it."""

    def __init__(self, table: NodeTable, selection: Selection, instead: object) -> None:
        self._table = table
        self._selection = selection
        self._instead = instead
        self._whole: set[int] = set()
        self._partly: set[int] = set()
        # By container that is looked into, the numbers of the children that are kept.
        self._kept: dict[int, set[int]] = {}
        # By container, the containers that have it as a child, with the number of the child. If it is kept, they are.
        self._parents: dict[int, list[tuple[int, int]]] = {}

    def run(self) -> None:
        table = self._table
        root = table.node(table.root)
        if root is None or table.forms[root]["is"] not in LOOKED_INTO:
            raise ValueError(
                "only= selects parts of dicts, lists and tuples, and the checkpoint"
                f"{self._selection.where} is none of these"
            )
        self._select_all_below(root)
        partly = self._partly - self._whole
        if root in partly and not self._kept.get(root):
            self._selection.check_matched()
            raise self._selection.nothing_chosen()
        for index in releasing_gil(partly):
            self._cut(index)

    def _select_all_below(self, root: int) -> None:
        """Walk from the root through what may be kept in part."""
        pending: list[tuple[int, LinkedPath]] = [(root, None)]
        self._partly.add(root)
        while pending:
            index, place = pending.pop()
            found: list[tuple[int, LinkedPath]] = []
            for number, (key, child) in enumerate(self._table.edges(index)):
                here = (path_step(key), place)
                node = self._table.node(child)
                if self._selection.chooses(unlinked(here)):
                    self._keep(index, number)
                    if node is not None:
                        self._keep_below(node)
                elif node is not None and self._table.forms[node]["is"] in LOOKED_INTO:
                    # It may have been visited before, by another path; later choices find this one in _parents.
                    if node in self._whole or self._kept.get(node):
                        self._keep(index, number)
                    self._parents.setdefault(node, []).append((index, number))
                    if node not in self._partly:
                        self._partly.add(node)
                        found.append((node, here))
                release_gil()
            pending += reversed(found)

    def _keep(self, index: int, number: int) -> None:
        """Keep a child of a container, and the container as a child of its parents, and so on up to the root."""
        pending = [(index, number)]
        while pending:
            index, number = pending.pop()
            kept = self._kept.setdefault(index, set())
            first = not kept
            kept.add(number)
            if first:
                pending += self._parents.get(index, ())

    def _keep_below(self, index: int) -> None:
        """Keep a node and everything below it."""
        pending = [index]
        while pending:
            index = pending.pop()
            if index in self._whole or self._table.forms[index]["is"] not in LOOKED_INTO:
                continue
            self._whole.add(index)
            for parent, number in self._parents.get(index, ()):
                self._keep(parent, number)
            for _, child in self._table.edges(index):
                node = self._table.node(child)
                if node is not None:
                    pending.append(node)
            release_gil()

    def _cut(self, index: int) -> None:
        """Leave the children out of a container that are not kept."""
        kept = self._kept.get(index, set())
        children = self._table.children[index]
        if self._table.forms[index]["is"] in ("list", "tuple"):
            children[:] = [child if number in kept else self._instead for number, child in enumerate(children)]
            return
        pairs = list(self._table.edges(index))
        children[:] = [item for number, pair in enumerate(pairs) if number in kept for item in pair]
