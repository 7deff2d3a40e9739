"""One profile out of several of the same model on the same kind of device: grids are united, the latest entry wins."""

from __future__ import annotations

from collections.abc import Sequence

from stagewright.planner.documents import ConfigurationCost, LayerClass, ModelProfile, Pedigree
from stagewright.planner.errors import InvalidArgument


def merge_profiles(profiles: Sequence[ModelProfile]) -> ModelProfile:
    """Return the union of the profiles' configurations; where two hold the same one, the later taken counts.

    Raises
    ------
    InvalidArgument : when there is none, or they differ in layers, dtype, device or load, with both values.
    """
    if not profiles:
        raise InvalidArgument("there is nothing to merge", field="profiles", hint="name at least one profile")
    first = profiles[0]
    for other in profiles[1:]:
        _check_alike(first, other)
    ordered = sorted(profiles, key=lambda profile: profile.pedigree.taken_at)
    latest = ordered[-1]
    classes = {name: _merged([profile.classes[name] for profile in ordered]) for name in latest.classes}
    return latest.model_copy(update={"classes": classes, "pedigree": _pedigree(ordered)})


def _check_alike(first: ModelProfile, other: ModelProfile) -> None:
    pairs = {
        "layers": (first.layer_digest, other.layer_digest),
        "dtype": (first.dtype, other.dtype),
        "pedigree.device": (first.pedigree.device, other.pedigree.device),
        "pedigree.num_busy_ranks": (first.pedigree.num_busy_ranks, other.pedigree.num_busy_ranks),
        "pedigree.threads_per_rank": (first.pedigree.threads_per_rank, other.pedigree.threads_per_rank),
        "pedigree.compiled": (first.pedigree.compiled, other.pedigree.compiled),
    }
    for field, (mine, theirs) in pairs.items():
        if mine != theirs:
            raise InvalidArgument(
                f"profiles of {first.name} and {other.name} differ in {field}: {mine} and {theirs}",
                field=field,
                hint="only profiles of one model on one kind of device, under one load, merge",
            )


def _merged(values: Sequence[LayerClass]) -> LayerClass:
    by_key: dict[tuple[int, int, int], ConfigurationCost] = {}
    for value in values:
        by_key.update({cost.key: cost for cost in value.costs})
    costs = tuple(by_key[key] for key in sorted(by_key, key=lambda key: (key[2], key[1], key[0])))
    return values[-1].model_copy(update={"costs": costs})


def _pedigree(ordered: Sequence[ModelProfile]) -> Pedigree:
    latest = ordered[-1].pedigree
    warnings = [warning for profile in ordered for warning in profile.pedigree.warnings]
    for profile in ordered[:-1]:
        changed = sorted(
            name
            for name in {*profile.pedigree.versions, *latest.versions}
            if profile.pedigree.versions.get(name) != latest.versions.get(name)
        )
        if changed:
            warnings.append(
                f"merged with a profile of {profile.pedigree.taken_at} under other versions of {', '.join(changed)}"
            )
    return latest.model_copy(
        update={
            "warnings": tuple(dict.fromkeys(warnings)),
            "duration_s": sum(profile.pedigree.duration_s for profile in ordered),
        }
    )
