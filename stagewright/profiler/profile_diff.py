"""What changed between two profiles of one model, and what of it is more than the spread of measuring.

A class's times in a configuration are compared relative to the first profile. A change counts when it exceeds the
tolerance and the two [p20, p80] intervals do not touch; bytes are counted, so any change of them does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from stagewright.planner.documents import ConfigurationCost, ModelProfile, Recompute

_TIMES = ("forward_s", "input_grad_s", "weight_grad_s")


@dataclass(frozen=True)
class Change:
    """One number of one class in one configuration, before and after."""

    layer_class: str
    configuration: tuple[int, int, int]
    field: str
    before: float
    after: float

    @property
    def relative(self) -> float:
        """after / before - 1; infinite from zero."""
        if self.before == 0:
            return 0.0 if self.after == 0 else float("inf")
        return self.after / self.before - 1.0


@dataclass(frozen=True)
class ProfileDiff:
    """All differences between two profiles.

    `same_layers` says whether the structure is the same; `versions` and `surroundings` hold (before, after) by name.
    """

    same_layers: bool
    versions: dict[str, tuple[str, str]]
    surroundings: dict[str, tuple[str, str]]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    changes: tuple[Change, ...]

    def to_json(self) -> dict[str, object]:
        """Return the document of `profile diff --json`."""
        document = asdict(self)
        document["changes"] = [
            {**asdict(change), "relative": change.relative if change.before else None} for change in self.changes
        ]
        return document


def diff_profiles(before: ModelProfile, after: ModelProfile, *, tolerance: float = 0.03) -> ProfileDiff:
    """Return what differs, largest relative change of time first."""
    old, new = _entries(before), _entries(after)
    changes = [change for key in old if key in new for change in _changes(key[0], old[key], new[key], tolerance)]
    changes.sort(key=lambda change: (-abs(change.relative), change.layer_class, change.configuration, change.field))
    first, second = before.pedigree, after.pedigree
    surroundings = {
        name: (str(getattr(first, name)), str(getattr(second, name)))
        for name in ("device", "driver", "num_busy_ranks", "threads_per_rank", "cache_policy", "compiled")
        if getattr(first, name) != getattr(second, name)
    }
    if before.dtype != after.dtype:
        surroundings["dtype"] = (before.dtype, after.dtype)
    names = sorted({*first.versions, *second.versions})
    return ProfileDiff(
        same_layers=before.layer_digest == after.layer_digest,
        versions={
            name: (first.versions.get(name, ""), second.versions.get(name, ""))
            for name in names
            if first.versions.get(name) != second.versions.get(name)
        },
        surroundings=surroundings,
        missing=tuple(_text(key) for key in old if key not in new),
        added=tuple(_text(key) for key in new if key not in old),
        changes=tuple(changes),
    )


Key = tuple[str, tuple[int, int, int]]


def _entries(profile: ModelProfile) -> dict[Key, ConfigurationCost]:
    return {(name, cost.key): cost for name, value in sorted(profile.classes.items()) for cost in value.costs}


def _text(key: Key) -> str:
    microbatch, sequence, degree = key[1]
    return f"{key[0]} at microbatch {microbatch}, sequence {sequence}, tensor degree {degree}"


def _changes(name: str, old: ConfigurationCost, new: ConfigurationCost, tolerance: float) -> list[Change]:
    found = []
    for field in _TIMES:
        change = Change(name, old.key, field, getattr(old, field), getattr(new, field))
        if abs(change.relative) > tolerance and _apart(old.spread.get(field), new.spread.get(field)):
            found.append(change)
    for level in Recompute:
        if level in old.activation_bytes and level in new.activation_bytes:
            values = (old.activation_bytes[level], new.activation_bytes[level])
            if values[0] != values[1]:
                found.append(Change(name, old.key, f"activation_bytes.{level}", *values))
    if old.output_bytes != new.output_bytes:
        found.append(Change(name, old.key, "output_bytes", old.output_bytes, new.output_bytes))
    return found


def _apart(first: tuple[float, float] | None, second: tuple[float, float] | None) -> bool:
    if first is None or second is None:
        return True
    return first[1] < second[0] or second[1] < first[0]
