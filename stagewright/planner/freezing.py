"""Layers that are not trained any more: what freezing leaves of their cost, and how many PipeTransformer freezes next.

A frozen layer holds its weights, without gradient and optimizer state. Where nothing before it is trained it has no
backward, keeps no activation and is never recomputed; behind trained layers it still passes the input gradient on.

PipeTransformer (He et al., ICML 2021) freezes a growing prefix. At the T-th decision, of L layers,

    L_frozen(T) = min( L_frozen(T-1) + alpha (L - L_frozen(T-1)),  argmin over l in L_frozen(T-1) .. L of |g_l| )

with g_l the gradient of layer l: it never freezes past the layer of least gradient, nor more than the share alpha of what
is left. It then halves the pipeline where the rest fits on half the devices, and spends the others on replicas. Here
that choice is the planner's: planning again with the frozen profile weighs every depth and replica count, and
`migration` lists what moves. PipeTransformer's cache of frozen activations is no part of this.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Literal

from stagewright.planner.documents.profile import LayerRun, ModelProfile
from stagewright.planner.errors import InvalidArgument

Backward = Literal["full", "input", "none"]

_SUFFIX: dict[Backward, str] = {"full": "", "input": " (frozen weights)", "none": " (frozen)"}


def frozen_prefix(profile: ModelProfile, num_layers: int) -> ModelProfile:
    """Return the profile with its first `num_layers` layers frozen; raises InvalidArgument unless some stay trained."""
    if not 0 <= num_layers < profile.num_layers:
        raise InvalidArgument(
            f"{num_layers} of {profile.num_layers} layers were to be frozen",
            field="num_layers",
            hint=f"freeze 0 to {profile.num_layers - 1}, so that something is trained",
        )
    return freeze(profile, profile.layer_names[:num_layers])


def freeze(profile: ModelProfile, names: Collection[str]) -> ModelProfile:
    """Return the profile with these layers frozen beside those that are.

    Raises
    ------
    InvalidArgument : for a name that is no layer, for weights shared with a layer that is trained on, or when nothing is
        left to train.
    """
    _check_names(profile, names)
    classes = profile.classes
    trained = [
        name not in names and classes[kind].is_trained
        for name, kind in zip(profile.layer_names, profile.layer_classes, strict=True)
    ]
    _check_ties(profile, dict(zip(profile.layer_names, trained, strict=True)))
    if not any(classes[kind].parameters for kind, keeps in zip(profile.layer_classes, trained, strict=True) if keeps):
        raise InvalidArgument("every layer with parameters would be frozen", field="layers", hint="leave one trained")
    backwards = _backwards(profile, trained)
    kinds = [
        _class_name(classes[kind].frozen_from or kind, backward)
        for kind, backward in zip(profile.layer_classes, backwards, strict=True)
    ]
    made = {}
    for kind, old, backward in zip(kinds, profile.layer_classes, backwards, strict=True):
        origin = classes[old].frozen_from or old
        changes = {"backward": backward, "frozen_from": None if backward == "full" else origin}
        made[kind] = classes[old].model_copy(update=changes)
    fields = {name: getattr(profile, name) for name in ModelProfile.model_fields}
    return ModelProfile(**{**fields, "layers": _runs(profile, kinds), "classes": made})


def next_frozen(gradient_norms: Sequence[float], num_frozen: int, *, alpha: float = 1 / 3) -> int:
    """Return how many layers PipeTransformer freezes next, given the gradient norm of each layer and those frozen now.

    Raises InvalidArgument for an alpha outside 0 .. 1 or more frozen layers than there are.
    """
    count = len(gradient_norms)
    if not 0 < alpha < 1:
        raise InvalidArgument(f"alpha is {alpha}, the share of the layers left lies between 0 and 1", field="alpha")
    if not 0 <= num_frozen < count:
        raise InvalidArgument(f"{num_frozen} of {count} layers are frozen, one at least is trained", field="num_frozen")
    least = min(range(num_frozen, count), key=lambda layer: (gradient_norms[layer], layer))
    return min(num_frozen + int(alpha * (count - num_frozen)), least)


def _class_name(origin: str, backward: Backward) -> str:
    return origin + _SUFFIX[backward]


def _backwards(profile: ModelProfile, trained: Sequence[bool]) -> list[Backward]:
    """Return what of each layer's backward runs: layers stand in topological order."""
    sources: dict[int, list[int]] = {}
    for source, target in profile.edge_indices:
        sources.setdefault(target, []).append(source)
    behind_trained = [False] * len(trained)
    found: list[Backward] = []
    for layer, keeps in enumerate(trained):
        parameters = profile.classes[profile.layer_classes[layer]].parameters
        before = any(behind_trained[source] for source in sources.get(layer, []))
        behind_trained[layer] = before or (keeps and parameters > 0)
        found.append("full" if keeps else "input" if before else "none")
    return found


def _runs(profile: ModelProfile, kinds: Sequence[str]) -> tuple[LayerRun, ...]:
    """Return the profile's layers as runs of equal classes."""
    runs: list[LayerRun] = []
    places = [(run.name, run.start + index) for run in profile.layers for index in range(run.count)]
    for (name, start), kind in zip(places, kinds, strict=True):
        last = runs[-1] if runs else None
        if last and (last.name, last.layer_class, last.start + last.count) == (name, kind, start):
            runs[-1] = last.model_copy(update={"count": last.count + 1})
        else:
            runs.append(LayerRun(name=name, layer_class=kind, start=start))
    return tuple(runs)


def _check_names(profile: ModelProfile, names: Collection[str]) -> None:
    unknown = sorted(set(names) - set(profile.layer_names))
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], profile.layer_names, n=1)
        raise InvalidArgument(
            f"{profile.name} has no layer {unknown[0]!r} to freeze",
            field="layers",
            hint=f"did you mean {nearest[0]}?" if nearest else "layers: " + ", ".join(profile.layer_names[:8]),
        )


def _check_ties(profile: ModelProfile, is_trained: dict[str, bool]) -> None:
    for tie in profile.tied:
        states = {is_trained[name] for name in tie.layers}
        if len(states) == 2:
            frozen = next(name for name in tie.layers if not is_trained[name])
            other = next(name for name in tie.layers if is_trained[name])
            raise InvalidArgument(
                f"{frozen} shares {tie.parameter} with {other}, which is trained on",
                field="layers",
                hint=f"freeze {other} too (--layer {other}), or profile the model without tied weights",
            )
