"""The declared space: which configurations and schedules a job allows, as an enumeration and in words.

Degrees run over the divisors of the devices that the model's shape admits; microbatches over the divisors of a
replica's batch; schedules over the families whose sizes fit. Pins, forbids and the job's own limits cut the product
before anything is priced. What is left out is said in `describe`, because the certificate speaks of this space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.groups import AxisOrder
from stagewright.planner.cost.layer_table import LEVELS
from stagewright.planner.documents.job import SearchSpace, TrainingJob
from stagewright.planner.documents.profile import ModelProfile, Recompute
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.chimera import bidirectional_placement
from stagewright.planner.schedules.registry import families, family
from stagewright.planner.schedules.sizes import Placement

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

# Runs branches of a model side by side; searched over stage graphs (`stage_graph`), not over chains.
STAGE_GRAPH_FAMILIES = ("graphpipe", "distmm")

PIPELINE_OUTSIDE: AxisOrder = ("tp", "cp", "dp", "pp")
PIPELINE_INSIDE: AxisOrder = ("tp", "cp", "pp", "dp")


@dataclass(frozen=True)
class FamilyRule:
    """When the search may use a family, and which bound its orders obey.

    Parameters
    ----------
    chunks : chunk counts to try on a rank, given the most that the job allows.
    fits : whether D ranks, T microbatches and v chunks are sizes the family takes.
    parameters : what the generator is told so that the order has no fused pairs and no costs in it.
    bound : which path bounds hold (see `bounds`): "uniform" for 1F1B, "gpipe", "fused" and "split" for one chunk a rank
        with full or split backwards, "serial" where one rank works at a time, "both ways" for two replicas, "chunks"
        for anything else.
    live : how many microbatches each chunk of rank r holds at once at least: one, all T, D - r, 2 (D - r) - 1, or
        min(D, 2 (D - r) - 1).
    split : input and weight gradients may be apart.
    steady : from 4 D microbatches on, the live vectors of more microbatches cover those of fewer (by the same T mod D);
        else they cover those of the fewer's opening. A property test holds it.
    placement : the ranks of the stages of each replica on D ranks, where that is known long before the order is.
    """

    name: str
    chunks: Callable[[int], Iterable[int]]
    fits: Callable[[int, int, int], bool]
    parameters: tuple[tuple[str, int | float | str], ...] = ()
    bound: Literal["uniform", "gpipe", "fused", "split", "chunks", "serial", "both ways"] = "chunks"
    live: Literal["one", "all", "depth", "double", "group"] = "one"
    split: bool = False
    num_replicas: int = 1
    steady: bool = True
    placement: Callable[[int], Placement] | None = None

    @property
    def repeats(self) -> bool:
        """From 4 D microbatches on, the live vectors of more microbatches are those of fewer (by the same T mod D)."""
        return self.steady and self.live != "all"

    def least_live(self, num_ranks: int, num_microbatches: int) -> Floats:
        """Return how many microbatches every chunk of a rank holds at once, at least, [D]."""
        left = num_ranks - np.arange(num_ranks, dtype=np.float64)
        most = {
            "one": np.ones(num_ranks),
            "all": np.full(num_ranks, np.inf),
            "depth": left,
            "double": 2 * left - 1,
            "group": np.minimum(num_ranks, 2 * left - 1),
        }[self.live]
        return np.asarray(np.minimum(most, num_microbatches))


def _one(most: int) -> Iterable[int]:
    return (1,)


def _two(most: int) -> Iterable[int]:
    return (2,) if most >= 2 else ()


def _several(most: int) -> Iterable[int]:
    return range(2, most + 1)


def _even(most: int) -> Iterable[int]:
    return range(2, most + 1, 2)


def _always(ranks: int, microbatches: int, chunks: int) -> bool:
    return True


def _whole_groups(ranks: int, microbatches: int, chunks: int) -> bool:
    return microbatches % ranks == 0


def _both_ways(ranks: int, microbatches: int, chunks: int) -> bool:
    return ranks % 2 == 0 and microbatches % 2 == 0


def _filled_both_ways(ranks: int, microbatches: int, chunks: int) -> bool:
    return _both_ways(ranks, microbatches, chunks) and microbatches >= 2 * ranks


def _twice_filled(ranks: int, microbatches: int, chunks: int) -> bool:
    return microbatches >= 2 * ranks


def _warmed_up(ranks: int, microbatches: int, chunks: int) -> bool:
    return microbatches >= 2 * ranks - 1


# An effort would be spent on equal times, which no candidate has.
_AS_BUILT = (("effort", 0.0),)

RULES: tuple[FamilyRule, ...] = (
    FamilyRule("1f1b", _one, _always, bound="uniform", live="depth"),
    FamilyRule("gpipe", _one, _always, bound="gpipe", live="all"),
    FamilyRule("naive", _one, _always, bound="serial"),
    FamilyRule("dapple-pb", _one, _always, bound="fused", live="double"),
    FamilyRule("zb-h1", _one, _always, bound="split", split=True, parameters=_AS_BUILT),
    FamilyRule("zb-h2", _one, _warmed_up, bound="split", split=True, parameters=_AS_BUILT),
    FamilyRule("interleaved", _several, _whole_groups, live="group"),
    FamilyRule("interleaved-zb", _several, _whole_groups, split=True, parameters=_AS_BUILT),
    FamilyRule("breadth-first", _several, _always, live="all"),
    FamilyRule("wave", _even, _always, steady=False),
    FamilyRule("1f1b-v", _two, _always, parameters=_AS_BUILT),
    FamilyRule("zb-v", _two, _always, split=True, parameters=_AS_BUILT),
    FamilyRule("v-half", _two, _always, split=True, parameters=_AS_BUILT),
    FamilyRule("v-min", _two, _always, split=True, parameters=_AS_BUILT),
    FamilyRule("dualpipe-v", _two, _twice_filled, parameters=(("fused", 0),), split=True),
    FamilyRule(
        "dualpipe", _one, _filled_both_ways, parameters=(("fused", 0),), split=True, bound="both ways", num_replicas=2
    ),
    FamilyRule("chimera", _one, _both_ways, bound="both ways", num_replicas=2, placement=bidirectional_placement),
    FamilyRule("gems", _one, _both_ways, bound="both ways", num_replicas=2),
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
    for name in wanted - {rule.name for rule in rules} - set(STAGE_GRAPH_FAMILIES):
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

    A schedule of two pipelines has no other rank for the second one there.

    Every stage but the first and the last holds at least one layer that is neither, so there are at most as many stages
    as layers.
    """
    for rule in rules:
        for chunks in rule.chunks(space.max_chunks):
            if not allows(space, "chunks", chunks) or num_ranks * chunks > num_layers:
                continue
            if num_ranks == 1:
                if chunks == 1 and rule.num_replicas == 1:
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


def device_counts(num_devices: int) -> list[int]:
    """Return how many devices plans may use: all of them, or on at most 16 any number up to them."""
    if num_devices > 16:
        return [num_devices]
    return list(range(num_devices, 0, -1))


def shapes(profile: ModelProfile, job: TrainingJob, num_devices: int, per_node: int) -> Ints:
    """Return the configurations that use exactly `num_devices`, int32 [n, 12] with the columns of `shape.SHAPE`.

    Everything but the cost model's legality is applied: pins, forbids, divisibility of the batch, at most as many
    pipeline ranks as layers, tensor groups of at most a node (or 8), context shards of at least 1,024 tokens (or half of
    a shorter sequence), experts that drop the tensor split or keep it, a pipeline inside a node as second axis order.
    """
    space = job.space
    blocks: list[Ints] = []
    for tp, cp, variants in inner_splits(profile, job, num_devices, per_node):
        for ranks in divisors(num_devices // (tp * cp)):
            replicas = num_devices // (tp * cp * ranks)
            if ranks > profile.num_layers or job.global_batch % replicas:
                continue
            if not allows(space, "pp", ranks) or not allows(space, "dp", replicas):
                continue
            blocks += _block(profile, job, (tp, cp, replicas, ranks), variants, per_node)
    return np.concatenate(blocks) if blocks else np.zeros((0, 12), dtype=np.int32)


def inner_splits(
    profile: ModelProfile, job: TrainingJob, num_devices: int, per_node: int
) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Yield (tp, cp) of one replica on at most `num_devices`, with the choices of (sp, vocab_parallel) of that tp."""
    for tp in divisors(num_devices):
        if tp > max(per_node, 8) or not allows(job.space, "tp", tp) or not _shape_allows_tp(profile, tp):
            continue
        variants = _variants(profile, job, tp)
        for cp in divisors(num_devices // tp):
            if allows(job.space, "cp", cp) and _shape_allows_cp(profile, job, cp):
                yield tp, cp, variants


def _block(
    profile: ModelProfile,
    job: TrainingJob,
    grid: tuple[int, int, int, int],
    variants: Sequence[tuple[int, int]],
    per_node: int,
) -> list[Ints]:
    """Return the rows of one (tp, cp, dp, pp): every folding, ZeRO stage, microbatch and axis order."""
    tp, cp, replicas, ranks = grid
    space = job.space
    experts = _expert_choices(profile, job, tp, tp * cp * replicas)
    zeros = [zero for zero in sorted(set(space.zero)) if allows(space, "zero", zero)]
    has_experts = profile.architecture is not None and profile.architecture.num_experts > 0
    if replicas * cp == 1 and (not has_experts or all(tp * cp * replicas == ep * etp for ep, etp in experts)):
        zeros = zeros[:1]
    share = job.global_batch // replicas
    sizes = [size for size in divisors(share) if size <= space.max_microbatch and allows(space, "microbatch", size)]
    axes = [0, 1] if ranks > 1 and replicas > 1 and tp * cp * ranks <= per_node else [0]
    rows = [
        (tp, cp, replicas, ranks, ep, etp, sp, vocabulary, zero, size, share // size, axis)
        for ep, etp in experts
        for sp, vocabulary in variants
        for zero in zeros
        for size in sizes
        for axis in axes
    ]
    return [np.array(rows, dtype=np.int32)] if rows else []


def _variants(profile: ModelProfile, job: TrainingJob, tp: int) -> list[tuple[int, int]]:
    """Return the (sequence parallel, vocabulary parallel) choices of a tensor degree."""
    sequence = [1, 0] if tp > 1 and _splits_sequences(profile, tp) else [0]
    vocabulary = [1, 0] if tp > 1 else [0]
    return [
        (sp, vocab)
        for sp in sequence
        for vocab in vocabulary
        if allows(job.space, "sp", "on" if sp else "off")
        and allows(job.space, "vocab_parallel", "on" if vocab else "off")
    ]


def _splits_sequences(profile: ModelProfile, tp: int) -> bool:
    """Return whether sequence parallelism can be priced: by operators, or of blocks measured whole and cut in `tp`."""
    blocks = [layer for layer in profile.classes.values() if layer.kind == "block"]
    if any(layer.operators for layer in profile.classes.values()):
        return True
    return bool(blocks) and all({1, tp} <= {cost.tensor_degree for cost in layer.costs} for layer in blocks)


def _expert_choices(profile: ModelProfile, job: TrainingJob, tp: int, num_devices: int) -> list[tuple[int, int]]:
    experts = profile.architecture.num_experts if profile.architecture is not None else 0
    if not experts:
        trivial = allows(job.space, "ep", 1) and allows(job.space, "etp", 1)
        return [(1, 1)] if trivial else []
    return [
        (ep, etp)
        for ep in divisors(experts)
        if num_devices % ep == 0 and allows(job.space, "ep", ep)
        for etp in sorted({1, tp})
        if num_devices % (ep * etp) == 0 and allows(job.space, "etp", etp)
    ]


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
    if shape is None or not shape.num_heads:
        return False
    return cp <= max(2, job.sequence_length // 1024) and job.sequence_length % (2 * cp) == 0


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
