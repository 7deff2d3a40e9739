"""A module's structure in words, by which equal layers are told."""

from __future__ import annotations

from torch import nn


def module_text(module: nn.Module) -> str:
    """Return the module's own text, or where that needs values which do not exist (on the meta device) its tree's types."""
    try:
        return repr(module)
    except (RuntimeError, NotImplementedError):
        parts = [f"{path}: {type(part).__name__}({part.extra_repr()})" for path, part in module.named_modules()]
        return "\n".join(parts)
