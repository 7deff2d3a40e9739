"""Which modules of a model tensor parallelism splits, and how.

A plan maps module paths, with `*` for any index, to roles:

    column      a linear layer split by its outputs (queries, keys, values; the first of a feed-forward pair)
    row         a linear layer split by its inputs (attention's output; the last of a feed-forward pair)
    vocabulary  an embedding or a head split by the vocabulary

It comes from the model's `stagewright_tensor_plan()`, from a Hugging Face config's `base_model_tp_plan`, or from the table
below for Hugging Face models without one. A column layer's heads must lie together: a fused projection is split rightly
only when it is viewed as [heads, 3, size], not as [3, heads, size].
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from stagewright.planner.errors import InvalidArgument

Role = Literal["column", "row", "vocabulary"]

_HUGGING_FACE_ROLES: Mapping[str, Role] = {"colwise": "column", "rowwise": "row"}

_BERT: Mapping[str, Role] = {
    "encoder.layer.*.attention.self.query": "column",
    "encoder.layer.*.attention.self.key": "column",
    "encoder.layer.*.attention.self.value": "column",
    "encoder.layer.*.attention.output.dense": "row",
    "encoder.layer.*.intermediate.dense": "column",
    "encoder.layer.*.output.dense": "row",
}
_BY_MODEL_TYPE: Mapping[str, Mapping[str, Role]] = {"bert": _BERT}


def tensor_plan(model: nn.Module) -> dict[str, Role]:
    """Return the role of each module that is split, by path; raises InvalidArgument when the model has no plan."""
    patterns = _patterns(model)
    if patterns is None:
        raise InvalidArgument(
            f"{type(model).__name__} has no tensor-parallel plan",
            field="degrees.tp",
            hint="give it stagewright_tensor_plan(), which maps module paths to column, row or vocabulary",
        )
    found: dict[str, Role] = {}
    for pattern, role in patterns.items():
        matches = [path for path, _ in model.named_modules() if _matches(path, pattern)]
        found.update(dict.fromkeys(matches, role))
    return found


def _patterns(model: nn.Module) -> Mapping[str, Role] | None:
    if hasattr(model, "stagewright_tensor_plan"):
        return dict(model.stagewright_tensor_plan())
    config = getattr(model, "config", None)
    if config is None:
        return None
    prefix = getattr(model, "base_model_prefix", "")
    lead = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    declared = getattr(config, "base_model_tp_plan", None)
    if declared:
        known = {path: _HUGGING_FACE_ROLES[style] for path, style in declared.items() if style in _HUGGING_FACE_ROLES}
    else:
        known = dict(_BY_MODEL_TYPE.get(getattr(config, "model_type", ""), {}))
    if not known:
        return None
    patterns: dict[str, Role] = {f"{lead}{path}": role for path, role in known.items()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is model.get_input_embeddings():
            patterns[path] = "vocabulary"
        if isinstance(module, nn.Linear) and module is model.get_output_embeddings():
            patterns[path] = "vocabulary"
    return patterns


def _matches(path: str, pattern: str) -> bool:
    steps, wanted = path.split("."), pattern.split(".")
    return len(steps) == len(wanted) and all(fnmatchcase(a, b) for a, b in zip(steps, wanted, strict=True))
