"""Finding the nodes that lead back to themselves through objects with code of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from aiostage._capture.nodes import Node

__all__ = ["entries_of_circles"]

Leads = Callable[[Node], Sequence[Node]]
"""Returns what a node leads to, in the order of copying."""


def entries_of_circles(root: Node, some: Sequence[Node], leads: Leads) -> list[Node]:
    """Return where copying from the root enters each circle that one of some nodes lies in.

    What such a node's code sees of the circle depends on where copying began.

    Args:
        root: Leads to all of them.
        some: Nodes that may lie in circles.
        leads: Returns what a node leads to.
    """
    circle_of: dict[int, int] = {}
    wanted = set(map(id, some))
    number = 0
    for component in _components(some, leads):
        if not wanted.isdisjoint(map(id, component)) and (len(component) > 1 or component[0] in leads(component[0])):
            circle_of.update((id(node), number) for node in component)
            number += 1
    entries: dict[int, Node] = {}
    if circle_of:
        for node in _depth_first(root, leads):
            if id(node) in circle_of:
                entries.setdefault(circle_of[id(node)], node)
    return list(entries.values())


def _depth_first(root: Node, leads: Leads) -> Iterator[Node]:
    seen: set[int] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            stack += reversed(leads(node))


def _components(roots: Sequence[Node], leads: Leads) -> Iterator[list[Node]]:
    """Yield the strongly connected components of what some nodes lead to, after Tarjan."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    open_nodes: list[Node] = []
    is_open: set[int] = set()
    for root in roots:
        if id(root) in index:
            continue
        stack: list[tuple[Node, Iterator[Node]]] = []
        following: Node | None = root
        while following is not None or stack:
            if following is not None:
                index[id(following)] = low[id(following)] = len(index)
                open_nodes.append(following)
                is_open.add(id(following))
                stack.append((following, iter(leads(following))))
                following = None
            node, children = stack[-1]
            for child in children:
                if id(child) not in index:
                    following = child
                    break
                if id(child) in is_open:
                    low[id(node)] = min(low[id(node)], index[id(child)])
            if following is not None:
                continue
            stack.pop()
            if stack:
                parent = id(stack[-1][0])
                low[parent] = min(low[parent], low[id(node)])
            if low[id(node)] == index[id(node)]:
                position = next(place for place in reversed(range(len(open_nodes))) if open_nodes[place] is node)
                component = open_nodes[position:]
                del open_nodes[position:]
                is_open.difference_update(map(id, component))
                yield component
