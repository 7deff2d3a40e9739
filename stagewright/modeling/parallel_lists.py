"""Lists of modules that one loop walks together: one layer is one module of each.

A model may keep its attentions in one list and its feed-forwards in another. Whether the lists are walked side by side or
one after another stands in the forward of the module that holds them, so that is read.
"""

from __future__ import annotations

import ast
import inspect
import textwrap

from torch import nn


def lists_walked_together(parent: nn.Module, name: str) -> tuple[str, ...]:
    """Return the names of the parent's lists that are walked in one loop with the list `name`, in order of use.

    Only lists of the same length count; `(name,)` when there is no other, or the forward cannot be read.
    """
    length = len(getattr(parent, name))
    alike = {
        other for other, child in parent.named_children() if isinstance(child, nn.ModuleList) and len(child) == length
    }
    if name not in alike or len(alike) == 1:
        return (name,)
    for loop in _loops(parent):
        used = [other for other in _own_names(loop) if other in alike]
        if name in used:
            return tuple(dict.fromkeys(used))
    return (name,)


def _loops(parent: nn.Module) -> list[ast.For]:
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(parent).forward)))
        return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For)]
    except (OSError, TypeError, SyntaxError):
        return []


def _own_names(loop: ast.For) -> list[str]:
    """Return the attributes of `self` that a loop uses, in the order of the text; one walked by its head, where its item is."""
    walked = _own_attributes(loop.iter)
    items = [node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)]
    if isinstance(loop.iter, ast.Call) and isinstance(loop.iter.func, ast.Name) and loop.iter.func.id == "enumerate":
        items = items[1:]
    body = [node for statement in loop.body for node in ast.walk(statement)]
    found = [position for statement in loop.body for position in _own_attributes(statement)]
    mentioned = {name for _, _, name in found}
    for place, (_, _, name) in enumerate(walked):
        if name in mentioned:
            continue
        item = items[place] if len(items) == len(walked) else None
        uses = [(node.lineno, node.col_offset, name) for node in body if isinstance(node, ast.Name) and node.id == item]
        found.append(min(uses, default=walked[place]))
    return [name for _, _, name in sorted(found)]


def _own_attributes(tree: ast.AST) -> list[tuple[int, int, str]]:
    """Return the places and names of the attributes of `self` within, in the order of the text."""
    return sorted(
        (node.lineno, node.col_offset, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    )
