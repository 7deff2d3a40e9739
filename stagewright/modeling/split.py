"""Finding the layers of a model in its module tree, without running it.

Three kinds of models, in this order:

1. a model with `stagewright_layers()`, which returns its layers by name, in order; `stagewright_edges()` may say which
   layer feeds which, for a graph;
2. `nn.Sequential`: its children are the layers;
3. any other: the list that a Hugging Face configuration names in `base_model_pp_plan`, or the longest ModuleList or
   Sequential of one class (or of the classes that the model names in `_no_split_modules`) holds the repeated layers. What is registered before it, on the way from the root, is one layer
   (the embedding or stem); what comes after are layers of their own, and the loss is the last. The model's own forward
   runs between them (see `own_forward`), so that masks, positions and rotary tables are made where they are needed.

Lists that one loop of the forward walks together are layers of one module of each. A ModuleList or ModuleDict is never
called, so what it holds stands in its place. LayerDrop is switched off, since a stage's layers always run.

Modules without parameters outside the repeated ones (dropout, rotary tables) are no layers: every stage keeps them.
Order of registration is taken for order of use, but for a few well-known names (`lm_head`, `final_layer_norm`);
`own_forward` raises where a model does otherwise.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from stagewright.modeling.chain import LayerChain
from stagewright.modeling.layer import Kind, Layer, Tie
from stagewright.modeling.layer_drop import switch_off_layer_drop
from stagewright.modeling.layer_list import LayerList
from stagewright.modeling.module_text import module_text
from stagewright.modeling.own_forward import OwnForward
from stagewright.modeling.parallel_lists import lists_walked_together
from stagewright.planner.errors import InvalidArgument

_CONTAINERS = (nn.ModuleList, nn.Sequential)
_FEWEST = 2
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Draft:
    name: str
    modules: tuple[str, ...]
    repeated: bool = False


def split(model: nn.Module, *, pattern: str | None = None) -> LayerChain:
    """Return the model cut into layers; raises InvalidArgument when no layers are found.

    `pattern`, such as `model.layers.*`, says which modules are the repeated layers, whatever else would be found.

    A Hugging Face model's key/value cache, useless in training, is switched off.
    """
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    probability = switch_off_layer_drop(model)
    if probability:
        _log.warning("layerdrop %g is taken as 0: a stage's layers always run", probability)
    if pattern is None and hasattr(model, "stagewright_layers"):
        modules: Mapping[str, nn.Module] = dict(model.stagewright_layers())
        edges = tuple(model.stagewright_edges()) if hasattr(model, "stagewright_edges") else None
        return _explicit(model, modules, edges)
    if pattern is None and isinstance(model, nn.Sequential):
        return _explicit(model, dict(model.named_children()), None)
    drafts = _drafts(model, _longest_container(model) if pattern is None else _container(model, pattern))
    layers = _with_classes(model, [*drafts, _Draft("loss", ())], loose=True)
    return LayerChain(model, layers, ties_of(model, layers), None, OwnForward(model, layers))


def _explicit(
    model: nn.Module, modules: Mapping[str, nn.Module], edges: tuple[tuple[str, str], ...] | None
) -> LayerChain:
    if not modules:
        raise InvalidArgument(f"{type(model).__name__} has no layers", field="model")
    paths = {id(module): path for path, module in model.named_modules()}
    drafts = []
    for name, module in modules.items():
        if id(module) not in paths:
            raise InvalidArgument(f"layer {name!r} is not a module of {type(model).__name__}", field="model")
        drafts.append(_Draft(name, (paths[id(module)],), repeated=True))
    layers = _with_classes(model, drafts, loose=False)
    executor = LayerList(model, layers, tuple(modules.values()), edges)
    return LayerChain(model, layers, ties_of(model, layers), edges, executor)


def _drafts(model: nn.Module, path: str | None) -> list[_Draft]:
    if path is None:
        children = [name for name, child in model.named_children() if _has_parameters(child)]
        children = [part for name in children for part in _called(model, name)]
        if not children:
            raise InvalidArgument(
                f"{type(model).__name__} has no modules with parameters to cut at",
                field="model",
                hint="give it stagewright_layers(), which returns its layers by name in order",
            )
        return [_Draft(name, (name,)) for name in children]
    before: list[str] = []
    repeated: list[_Draft] = []
    after: list[str] = []
    parent, _, own = path.rpartition(".")
    lists = [f"{parent}.{name}".lstrip(".") for name in lists_walked_together(model.get_submodule(parent), own)]
    siblings = [
        (name, child)
        for name, child in _siblings(model, path)
        if _has_parameters(child) and (name == path or name not in lists)
    ]
    positions = {name: _position(name, path, model) for name, _ in siblings}
    for name, child in sorted(siblings, key=lambda item: (positions[item[0]], -_shared_depth(item[0], path))):
        position = positions[name]
        flattens = isinstance(child, nn.Sequential) or name == path
        if name == path and len(lists) > 1:
            repeated += _rows(model, path, lists)
        elif name == path:
            repeated += [_Draft(part, (part,), True) for part in _children(model, path)]
        elif position <= 0 and flattens:
            repeated += [_Draft(f"{name}.{key}", (f"{name}.{key}",), True) for key, _ in child.named_children()]
        elif position < 0 and not repeated:
            before += _called(model, name)
        elif position < 0:
            repeated += [_Draft(part, (part,), True) for part in _called(model, name)]
        elif flattens:
            after += [f"{name}.{key}" for key, part in child.named_children() if _has_parameters(part)]
        else:
            after += _called(model, name)
    first = [_Draft(_name_of_first(model, before), tuple(before))] if before else []
    return [*first, *repeated, *(_Draft(name, (name,)) for name in after)]


def _rows(model: nn.Module, path: str, lists: list[str]) -> list[_Draft]:
    """Return layers of one module of each list."""
    rows = []
    for key, _ in model.get_submodule(path).named_children():
        modules = tuple(part for name in lists for part in _called(model, f"{name}.{key}"))
        rows.append(_Draft(f"{path}.{key}", modules, True))
    return rows


def _children(model: nn.Module, path: str) -> list[str]:
    """Return the paths of a container's children that are called."""
    return [part for key, _ in model.get_submodule(path).named_children() for part in _called(model, f"{path}.{key}")]


def _called(model: nn.Module, path: str) -> list[str]:
    """Return the path, or where the module is a list or mapping of modules the paths of what it holds that has parameters."""
    module = model.get_submodule(path)
    if type(module) not in _NEVER_CALLED:
        return [path]
    held = [f"{path}.{key}" for key, child in module.named_children() if _has_parameters(child)]
    return [part for name in held for part in _called(model, name)]


def _longest_container(model: nn.Module) -> str | None:
    """Return the path of the list of repeated layers: the declared one, else the longest of the large ones.

    Large is one with at least half as many parameters as any: a block's experts, which may be more than the blocks, are not.
    """
    declared = _declared_container(model)
    if declared is not None:
        return declared
    whole = set(getattr(model, "_no_split_modules", None) or ())
    sizes: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, _CONTAINERS) or not path or len(module) < _FEWEST:
            continue
        classes = {type(child).__name__ for child in module.children()}
        if (len(classes) == 1 or classes <= whole) and _has_parameters(module):
            sizes[path] = (len(module), sum(value.numel() for value in module.parameters()))
    most = max((parameters for _, parameters in sizes.values()), default=0)
    large = [path for path, (_, parameters) in sizes.items() if 2 * parameters >= most]
    return max(large, key=lambda path: sizes[path][0], default=None)


def _declared_container(model: nn.Module) -> str | None:
    """Return the list that a Hugging Face configuration's `base_model_pp_plan` names, if there is one."""
    plan = getattr(getattr(model, "config", None), "base_model_pp_plan", None) or {}
    base = getattr(model, "base_model_prefix", "")
    prefix = f"{base}." if base and hasattr(model, base) else ""
    known = dict(model.named_modules())
    for name in plan:
        module = known.get(f"{prefix}{name}")
        if isinstance(module, _CONTAINERS) and len(module) >= _FEWEST and _has_parameters(module):
            return f"{prefix}{name}"
    return None


def _container(model: nn.Module, pattern: str) -> str:
    """Return the path of the container that a pattern `path.*` names."""
    path = pattern.removesuffix(".*")
    known = {name for name, module in model.named_modules() if name and isinstance(module, _CONTAINERS) and len(module)}
    if path == pattern or path not in known:
        raise InvalidArgument(
            f"the pattern {pattern!r} names no list of layers",
            field="layers",
            hint="write one of " + ", ".join(f"{name}.*" for name in sorted(known)) if known else None,
        )
    return path


def _siblings(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield what stands before the path, the path itself, and what stands after it, outermost first and last."""
    steps = path.split(".")
    yield from _walk(model, "", steps)


def _walk(module: nn.Module, prefix: str, steps: list[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if name == steps[0]:
            if len(steps) == 1:
                yield prefix + name, child
            else:
                yield from _walk(child, f"{prefix}{name}.", steps[1:])
        else:
            yield prefix + name, child


def _shared_depth(name: str, path: str) -> int:
    pairs = zip(name.split("."), path.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _position(name: str, path: str, model: nn.Module) -> int:
    """Return when a module is used: before the repeated layers (-1), as them (0), or after (1; a projection 2, a head 3).

    That is the order of registration, except for modules whose name says otherwise: the norm of an embedding
    (`layernorm_embedding`), a position bias that layers share and further embeddings, the last norm, the last projection and a language
    model's head, wherever they stand; an image's tower is used before a text's. What stands deeper in the tree beside the
    repeated layers is used before what comes after the module around it.
    """
    if name == path:
        return 0
    own = name.rpartition(".")[2]
    if ("norm" in own and own.endswith(("embedding", "embeddings"))) or own.startswith(
        ("relative_attention", "rel_emb", "embed_")
    ):
        return -1
    if own in _TOWERS:
        return _TOWERS[own]
    if own == "visual_projection":
        return -1 if "text_model" in path.split(".") else 1
    named = _LAST.get(own, 1 if own.startswith("final_") and "norm" in own else 0)
    order = {other: index for index, (other, _) in enumerate(model.named_modules())}
    return named or (-1 if order[name] < order[path] else 1)


_TOWERS = {"vision_model": -1, "vision_tower": -1, "visual": -1, "text_model": 2, "text_projection": 3}
_LAST = {"embedding_norm": 1, "project_out": 2, "lm_head": 3}


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _name_of_first(model: nn.Module, paths: list[str]) -> str:
    if len(paths) == 1:
        return paths[0]
    holds_embedding = any(
        isinstance(part, nn.Embedding) for path in paths for part in model.get_submodule(path).modules()
    )
    return "embedding" if holds_embedding else "stem"


def _with_classes(model: nn.Module, drafts: list[_Draft], *, loose: bool) -> tuple[Layer, ...]:
    """Return layers with kinds, classes and parameters; with `loose`, the first also owns what no module layer does."""
    owned = [
        [f"{path}.{name}" if path else name for path in draft.modules for name in _parameter_names(model, path)]
        for draft in drafts
    ]
    if loose:
        taken = {name for names in owned for name in names}
        every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        owned[0] = [name for name in every if name not in taken] + owned[0]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    last_linear = _last_head(model, drafts)
    layers = []
    for index, (draft, names) in enumerate(zip(drafts, owned, strict=True)):
        distinct = {id(parameters[name]): parameters[name].numel() for name in names if parameters[name].requires_grad}
        kind = _kind(model, draft, index, is_head=index == last_linear)
        layers.append(Layer(draft.name, kind, "", draft.modules, tuple(names), sum(distinct.values())))
    return _named_classes(model, layers)


def _parameter_names(model: nn.Module, path: str) -> list[str]:
    return [name for name, _ in model.get_submodule(path).named_parameters(remove_duplicate=False)]


def _last_head(model: nn.Module, drafts: list[_Draft]) -> int | None:
    for index in reversed(range(len(drafts))):
        if drafts[index].modules and index > 0:
            module = model.get_submodule(drafts[index].modules[0])
            if _has_parameters(module):
                return index if not drafts[index].repeated or isinstance(module, nn.Linear) else None
    return None


def _kind(model: nn.Module, draft: _Draft, index: int, *, is_head: bool) -> Kind:
    if not draft.modules:
        return "loss"
    modules = [model.get_submodule(path) for path in draft.modules]
    name = type(modules[0]).__name__.lower()
    if any(isinstance(part, nn.Embedding) for module in modules for part in module.modules()) and index == 0:
        return "embedding"
    if name.endswith("loss") or draft.name == "loss":
        return "loss"
    if "norm" in name:
        return "norm"
    if "pool" in name:
        return "pooling"
    if is_head:
        return "head"
    if isinstance(modules[0], (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or (index == 0 and _holds_convolution(modules)):
        return "convolution"
    if draft.repeated and next(iter(modules[0].children()), None) is not None:
        return "block"
    return "other"


def _holds_convolution(modules: list[nn.Module]) -> bool:
    return any(isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for module in modules for part in module.modules())


def _named_classes(model: nn.Module, layers: list[Layer]) -> tuple[Layer, ...]:
    """Give equal layers one class name: the module's class, numbered where several structures share it."""
    names: dict[tuple[object, ...], str] = {}
    used: dict[str, int] = {}
    result = []
    for layer in layers:
        modules = [model.get_submodule(path) for path in layer.modules]
        key: tuple[object, ...] = tuple(_structure(module) for module in modules) if modules else (layer.name,)
        is_row = len(modules) > 1 and layer is not layers[0]
        if len(modules) != 1 and not is_row:
            key = (layer.name, *key)
        if key not in names:
            base = type(modules[0]).__name__ if len(modules) == 1 or is_row else layer.name
            used[base] = used.get(base, 0) + 1
            names[key] = base if used[base] == 1 else f"{base}-{used[base]}"
        result.append(replace(layer, layer_class=names[key]))
    return tuple(result)


def _structure(module: nn.Module) -> tuple[object, ...]:
    shapes = tuple(
        (name, tuple(value.shape), value.dtype, value.requires_grad) for name, value in module.named_parameters()
    )
    attention = tuple(getattr(part, "attention_type", "") for part in module.modules())
    return (type(module).__name__, module_text(module), shapes, attention)


def ties_of(model: nn.Module, layers: tuple[Layer, ...]) -> tuple[Tie, ...]:
    """Return the parameters that occur in more than one layer."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses: dict[int, list[tuple[str, str]]] = {}
    for layer in layers:
        for name in layer.parameters:
            uses.setdefault(id(parameters[name]), []).append((name, layer.name))
    ties = []
    for places in uses.values():
        holders = tuple(dict.fromkeys(layer for _, layer in places))
        if len(holders) > 1:
            names = tuple(name for name, _ in places)
            ties.append(Tie(names[0], names, holders, parameters[names[0]].numel()))
    return tuple(ties)
