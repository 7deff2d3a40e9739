"""Which modules of a model tensor parallelism splits, and how.

A plan maps module paths, with `*` for any index, to roles:

    column      a linear layer split by its outputs (queries, keys, values; the first of a feed-forward pair)
    row         a linear layer split by its inputs (attention's output; the last of a feed-forward pair)
    vocabulary  an embedding or a head split by the vocabulary
    heads       a tensor with an entry a head (a bias of positions, a norm's weights), split with the heads
    norm        a root-mean-square norm over the features of all heads; its squares are summed over the ranks
    shared      a module that works on the rank's own heads and is whole on each; its gradients are summed
    latent      a linear layer, whole on each rank, from a block's input to what column layers start from, and behind that
                maybe a key that all heads share

It comes from the model's `stagewright_tensor_plan()`, or for a Hugging Face model from the table of families and the
config's `base_model_tp_plan`. A column layer's heads must lie together: a fused projection is split rightly only when it
is viewed as [heads, 3, size], not as [3, heads, size], unless the table says what lies one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any

from torch import nn

from stagewright.modeling.tensor_families import FAMILIES, INSIDE, Family, ModuleSplit, Role
from stagewright.planner.errors import InvalidArgument

_HUGGING_FACE_ROLES: Mapping[str, Role] = {
    "colwise": "column",
    "rowwise": "row",
    "replicated_with_grad_allreduce": "shared",
}


def tensor_plan(model: nn.Module) -> dict[str, ModuleSplit]:
    """Return how each module that is split is, by path; raises InvalidArgument when the model does not say it of any block."""
    plan = _of_model(model)
    if all(split.role == "vocabulary" for split in plan.values()):
        raise InvalidArgument(
            f"{type(model).__name__} has no tensor-parallel plan" + (" but for its vocabulary" if plan else ""),
            field="degrees.tp",
            hint="pin tp=1, or give it stagewright_tensor_plan(), which maps module paths to column, row or vocabulary",
        )
    return plan


def is_within(path: str, modules: Iterable[str]) -> bool:
    """Return whether a path is that of one of the modules, or of something in one."""
    return any(path == part or path.startswith(f"{part}.") for part in modules)


def _of_model(model: nn.Module) -> dict[str, ModuleSplit]:
    if hasattr(model, "stagewright_tensor_plan"):
        return _found(model, {path: ModuleSplit(role) for path, role in model.stagewright_tensor_plan().items()})
    config, prefix = getattr(model, "config", None), getattr(model, "base_model_prefix", "")
    lead = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    blocks = {} if config is None else _found(model, _family(config, lead))
    return blocks | _vocabulary(model) if blocks else {}


def _family(config: Any, lead: str) -> Family:  # noqa: ANN401
    """Return what a configuration and the table say of its model, and of models inside, with patterns from the root."""
    kind = getattr(config, "model_type", "")
    declared = {
        path: ModuleSplit(_HUGGING_FACE_ROLES[style])
        for path, style in (getattr(config, "base_model_tp_plan", None) or {}).items()
        if style in _HUGGING_FACE_ROLES
    }
    own = {f"{lead}{path}": _counted(config, split) for path, split in {**declared, **FAMILIES.get(kind, {})}.items()}
    for name, part in INSIDE.get(kind, {}).items():
        own |= _family(getattr(config, part), f"{lead}{name}.")
    return own


def _counted(config: Any, split: ModuleSplit) -> ModuleSplit:  # noqa: ANN401
    """Return the split with the configuration's numbers for their names."""
    sizes = (reduce(getattr, part.split("."), config) if isinstance(part, str) else part for part in split.parts)
    return replace(split, parts=tuple(int(size) for size in sizes))


def _vocabulary(model: nn.Module) -> dict[str, ModuleSplit]:
    """Return the input embedding, others with its weight, and the head, where they are modules that can be split."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = inputs.weight if isinstance(inputs, nn.Embedding) else None
    return {
        path: ModuleSplit("vocabulary")
        for path, module in model.named_modules()
        if (isinstance(module, nn.Embedding) and module.weight is weight)
        or (isinstance(module, nn.Linear) and module is head)
    }


def _found(model: nn.Module, family: Family) -> dict[str, ModuleSplit]:
    """Return the modules that patterns name, and the parameters of heads."""
    modules = [path for path, _ in model.named_modules()]
    heads = [path for path, _ in model.named_parameters(remove_duplicate=False)]
    found: dict[str, ModuleSplit] = {}
    for pattern, split in family.items():
        names = [*modules, *heads] if split.role == "heads" else modules
        found |= {path: split for path in names if _matches(path, pattern)}
    return found


def _matches(path: str, pattern: str) -> bool:
    steps, wanted = path.split("."), pattern.split(".")
    return len(steps) == len(wanted) and all(fnmatchcase(a, b) for a, b in zip(steps, wanted, strict=True))
