"""Parsing Python without the collector running inside the parser."""

from __future__ import annotations

import ast
import gc


def parse(text: str) -> ast.Module:
    """Parse a module.

    CPython 3.11 counts recursion while it turns a tree into objects, and a collection that comes in between, of
    objects whose finalizers call Python, makes the count come out wrong ("AST constructor recursion depth mismatch").
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if enabled:
            gc.enable()
