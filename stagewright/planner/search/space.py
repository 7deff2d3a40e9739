"""The declared space: which configurations and schedules a job allows, as an enumeration and in words.

Degrees run over the divisors of the devices that the model's shape admits; microbatches over the divisors of a
replica's batch; schedules over the families whose sizes fit. Pins, forbids and the job's own limits cut the product
before anything is priced. What is left out is said in `describe`, because the certificate speaks of this space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from stagewright.planner.cost.groups import AxisOrder
from stagewright.planner.cost.layer_table import LEVELS
from stagewright.planner.documents.job import SearchSpace, TrainingJob
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.documents.profile import ModelProfile, Recompute
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.registry import families, family

PIPELINE_OUTSIDE: AxisOrder = ("tp", "cp", "dp", "pp")
PIPELINE_INSIDE: AxisOrder = ("tp", "cp", "pp", "dp")


@dataclass(frozen=True)
class FamilyRule:
    """When the search may use a family.

    Parameters
    ----------
    chunks : chunk counts to try on a rank, given the most that the job allows.
    fits : whether D ranks, T microbatches and v chunks are sizes the family takes.
    parameters : what the generator is told so that the order has no fused pairs and no costs in it.
    """

    name: str
    chunks: Callable[[int], Iterable[int]]
    fits: Callable[[int, int, int], bool]
    parameters: tuple[tuple[str, int | float | str], ...] = ()
    num_replicas: int = 1


def _one(most: int) -> Iterable[int]:
    return (1,)


def _two(most: int) -> Iterable[int]:
    return (2,) if most >= 2 else ()


def _several(most: int) -> Iterable[int]:
    return range(2, most + 1)


def _always(ranks: int, microbatches: int, chunks: int) -> bool:
    return True


def _whole_groups(ranks: int, microbatches: int, chunks: int) -> bool:
    return microbatches % ranks == 0


RULES: tuple[FamilyRule, ...] = (
    FamilyRule("1f1b", _one, _always),
    FamilyRule("gpipe", _one, _always),
    FamilyRule("naive", _one, _always),
)


def allowed_rules(space: SearchSpace, *, all_rules: Sequence[FamilyRule] = RULES) -> list[FamilyRule]:
    """Return the families the job allows, in the order of the rules; raises InvalidArgument for an unknown name."""
    known = {row.name for row in families()}
    rules = [rule for rule in all_rules if rule.name in known]
    wanted = {family(name).name for name in space.schedules}
    if space.pins.schedule is not None:
        pinned = family(space.pins.schedule).name
        if wanted and pinned not in wanted:
            raise InvalidArgument(
                f"schedule is pinned to {pinned}, the job allows {', '.join(sorted(wanted))}",
                field="space.pins.schedule",
            )
        wanted = {pinned}
    for name in wanted - {rule.name for rule in rules}:
        raise InvalidArgument(
            f"the search does not cover schedule {name!r}",
            field="space.schedules",
            hint="it covers " + ", ".join(rule.name for rule in rules),
        )
    forbidden = {family(item.value).name for item in space.forbids if item.name == "schedule" and item.value}
    return [rule for rule in rules if (not wanted or rule.name in wanted) and rule.name not in forbidden]


def schedule_sizes(
    rules: Sequence[FamilyRule], space: SearchSpace, num_ranks: int, num_microbatches: int, num_layers: int
) -> Iterator[tuple[FamilyRule, int]]:
    """Yield the (family, chunks) that fit; one rank runs the first single-chunk family only, since orders do not matter.

    Every stage but the first and the last holds at least one layer that is neither, so there are at most as many stages
    as layers.
    """
    for rule in rules:
        for chunks in rule.chunks(space.max_chunks):
            if not allows(space, "chunks", chunks) or num_ranks * chunks > num_layers:
                continue
            if num_ranks == 1:
                if chunks == 1:
                    yield rule, chunks
                    return
                continue
            if rule.fits(num_ranks, num_microbatches, chunks):
                yield rule, chunks


_TRIVIAL = {"sp": "off", "vocab_parallel": "off", "zero": "0", "recompute": "none"}


def allows(space: SearchSpace, name: str, value: int | str) -> bool:
    """Tell whether pins and forbids admit a value."""
    pinned = getattr(space.pins, name)
    text = str(value)
    if pinned is not None and str(pinned) != text:
        return False
    for item in space.forbids:
        if item.name == name and (item.value == text if item.value is not None else text != _TRIVIAL.get(name, "1")):
            return False
    return True


def allowed_levels(space: SearchSpace) -> tuple[int, ...]:
    """Return the indices in LEVELS that layers may take."""
    levels = [
        index
        for index, level in enumerate(LEVELS)
        if level in space.recompute and allows(space, "recompute", level.value)
    ]
    if not levels:
        raise InvalidArgument(
            f"no recomputation level is left of {', '.join(level.value for level in Recompute)}",
            field="space.recompute",
            hint="allow at least one level",
        )
    return tuple(levels)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    small = [value for value in range(1, int(number**0.5) + 1) if number % value == 0]
    return small + [number // value for value in reversed(small) if value * value != number]


def device_counts(num_devices: int, *, exact: bool) -> list[int]:
    """Return how many devices plans may use: all of them, or on at most 16 any number up to them."""
    if exact or num_devices > 16:
        return [num_devices]
    return list(range(num_devices, 0, -1))


def degree_choices(profile: ModelProfile, job: TrainingJob, num_devices: int) -> Iterator[tuple[Degrees, int]]:
    """Yield (degrees, pipeline ranks) whose product is `num_devices`, before the cost model's legality."""
    space = job.space
    for tp in divisors(num_devices):
        if not allows(space, "tp", tp) or not _shape_allows_tp(profile, tp):
            continue
        for cp in divisors(num_devices // tp):
            if not allows(space, "cp", cp) or not _shape_allows_cp(profile, job, cp):
                continue
            for ranks in divisors(num_devices // (tp * cp)):
                replicas = num_devices // (tp * cp * ranks)
                if not allows(space, "pp", ranks) or not allows(space, "dp", replicas):
                    continue
                if ranks > profile.num_layers or job.global_batch % replicas:
                    continue
                for degrees in _variants(profile, job, Degrees(dp=replicas, tp=tp, cp=cp)):
                    yield degrees, ranks


def _variants(profile: ModelProfile, job: TrainingJob, base: Degrees) -> Iterator[Degrees]:
    """Yield the degrees with every expert folding, sequence parallelism, vocabulary split and ZeRO stage."""
    space = job.space
    for ep, etp in _expert_choices(profile, job, base):
        for sp in (True, False) if base.tp > 1 and profile.architecture is not None else (False,):
            if not allows(space, "sp", "on" if sp else "off"):
                continue
            for vocabulary in (True, False) if base.tp > 1 else (False,):
                if not allows(space, "vocab_parallel", "on" if vocabulary else "off"):
                    continue
                for zero in sorted(set(space.zero)) if base.dp * base.cp > 1 else (0,):
                    if allows(space, "zero", zero):
                        yield base.model_copy(
                            update={"ep": ep, "etp": etp, "sp": sp, "vocab_parallel": vocabulary, "zero": zero}
                        )


def _expert_choices(profile: ModelProfile, job: TrainingJob, base: Degrees) -> Iterator[tuple[int, int]]:
    experts = profile.architecture.num_experts if profile.architecture is not None else 0
    if not experts:
        if allows(job.space, "ep", 1) and allows(job.space, "etp", 1):
            yield 1, 1
        return
    for ep in divisors(experts):
        if base.num_devices % ep or not allows(job.space, "ep", ep):
            continue
        for etp in divisors(base.num_devices // ep):
            if etp <= max(base.tp, 1) and allows(job.space, "etp", etp):
                yield ep, etp


def _shape_allows_tp(profile: ModelProfile, tp: int) -> bool:
    shape = profile.architecture
    if tp == 1:
        return True
    if shape is not None and shape.num_heads:
        return shape.num_heads % tp == 0
    measured = {cost.tensor_degree for layer in profile.classes.values() for cost in layer.costs}
    return tp in measured or not measured


def _shape_allows_cp(profile: ModelProfile, job: TrainingJob, cp: int) -> bool:
    if cp == 1:
        return True
    shape = profile.architecture
    return shape is not None and bool(shape.num_heads) and job.sequence_length % (2 * cp) == 0


def check_pins(profile: ModelProfile, job: TrainingJob, num_devices: int) -> None:
    """Raise InvalidArgument when pins contradict each other or the devices, with the product and the devices."""
    pins = job.space.pins
    named = [(name, getattr(pins, name)) for name in ("dp", "tp", "cp", "pp") if getattr(pins, name) is not None]
    product = 1
    for _, value in named:
        product *= value
    text = " * ".join(f"{name} {value}" for name, value in named)
    if product > num_devices or (len(named) == 4 and num_devices % product):
        raise InvalidArgument(
            f"pins {text} make {product} devices, there are {num_devices}",
            field="space.pins",
            hint=f"pin degrees whose product is at most {num_devices}",
        )
    if num_devices % product and num_devices > 16:
        raise InvalidArgument(
            f"pins {text} make {product}, which does not divide the {num_devices} devices", field="space.pins"
        )
    share = (pins.dp or 1) * (pins.microbatch or 1)
    if job.global_batch % share:
        raise InvalidArgument(
            f"dp {pins.dp or 1} * microbatch {pins.microbatch or 1} = {share} does not divide the global batch "
            f"{job.global_batch}",
            field="space.pins",
        )
    if pins.sp == "on" and pins.tp == 1:
        raise InvalidArgument(
            "sp is pinned on and tp to 1; sp splits over the tensor-parallel group", field="space.pins.sp"
        )
    for item in job.space.forbids:
        if not allows(job.space, item.name, getattr(pins, item.name) or "") and getattr(pins, item.name) is not None:
            raise InvalidArgument(
                f"{item.name} is pinned to {getattr(pins, item.name)} and forbidden", field=f"space.pins.{item.name}"
            )
