"""A planning question compiled for search: configurations priced once, orders compiled once, candidates by index.

`Problem` holds the documents and caches what many candidates share: the cost model of an axis order, the layer costs of
a configuration, the wiring between its ranks, the order of a schedule. Nothing here decides; the planners do.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.groups import AxisOrder
from stagewright.planner.cost.layer_table import LEVELS
from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.plan import Plan, Prediction, RankMapping, RecomputeRun, ScheduleSpec, StagePlan
from stagewright.planner.documents.profile import ModelProfile, Source
from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.planned_devices import base_bytes
from stagewright.planner.planned_links import links_of, ties_of, wire
from stagewright.planner.planned_schedule import OPTIONS
from stagewright.planner.prediction import stage_costs
from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.search.layer_costs import Configuration, LayerCosts, layer_costs
from stagewright.planner.search.order import Layout, Order, OrderKey
from stagewright.planner.search.order_store import ORDERS, short_key
from stagewright.planner.search.pipeline_costs import PipelineCosts, Tie, Wiring, pipeline_costs
from stagewright.planner.search.pricing import (
    AXIS_ORDERS,
    LayerClasses,
    Priced,
    PriceList,
    classes_of,
    configuration_of,
    with_equal,
)
from stagewright.planner.search.space import (
    PIPELINE_OUTSIDE,
    FamilyRule,
    allowed_levels,
    allowed_rules,
    device_counts,
    schedule_sizes,
    shapes,
)
from stagewright.planner.simulation.simulate import simulate

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Candidate:
    """One point of the space but for stage boundaries and recomputation."""

    configuration: Configuration
    rule: FamilyRule
    num_chunks: int

    @property
    def key(self) -> OrderKey:
        configuration = self.configuration
        return OrderKey(self.rule.name, configuration.num_ranks, configuration.num_microbatches, self.num_chunks)

    @property
    def summary(self) -> str:
        """The choice in words."""
        degrees = self.configuration.degrees
        parts = [
            f"{name}={getattr(degrees, name)}" for name in ("dp", "tp", "cp", "ep", "etp") if getattr(degrees, name) > 1
        ]
        parts += [f"pp={self.configuration.num_ranks}"] if self.configuration.num_ranks > 1 else []
        parts += ["sp"] if degrees.sp else []
        parts += [f"zero={degrees.zero}"] if degrees.zero else []
        parts += [f"microbatch={self.configuration.microbatch}"]
        parts += [self.rule.name + (f" v={self.num_chunks}" if self.num_chunks > 1 else "")]
        return " ".join(parts)


@dataclass(frozen=True)
class Partition:
    """Stage boundaries and recomputation levels that complete a candidate."""

    bounds: tuple[int, ...]
    levels: tuple[int, ...]


@dataclass(eq=False)
class Problem:
    """A profile, a cluster and a job, with what searches share.

    Parameters
    ----------
    only_counts : how many devices plans may use; None for every count of `device_counts`.
    most_bytes : a limit on the peak of each device below its capacity.
    """

    profile: ModelProfile
    cluster: Cluster
    job: TrainingJob
    num_devices: int
    only_counts: tuple[int, ...] | None = None
    most_bytes: float = float("inf")
    _models: dict[AxisOrder, CostModel] = field(default_factory=dict)
    _costs: dict[Configuration, LayerCosts] = field(default_factory=dict)
    _wirings: dict[tuple[Configuration, int], Wiring] = field(default_factory=dict)
    _orders: dict[OrderKey, Order] = field(default_factory=dict)
    _prices: list[PriceList] = field(default_factory=list)
    _ties: dict[tuple[object, ...], tuple[tuple[int, int, Floats], ...]] = field(default_factory=dict)

    def narrowed(self, *, counts: tuple[int, ...] | None = None, most_bytes: float | None = None) -> Problem:
        """Return the problem on some device counts or with less memory, sharing what was priced and compiled."""
        return replace(
            self,
            only_counts=self.only_counts if counts is None else counts,
            most_bytes=self.most_bytes if most_bytes is None else most_bytes,
        )

    @cached_property
    def capacity_bytes(self) -> float:
        """Bytes a plan may use of a device, the headroom left free."""
        room = self.cluster.groups[0].device.memory_bytes * (1.0 - self.job.space.memory_headroom)
        return min(room, self.most_bytes)

    @cached_property
    def base_bytes(self) -> float:
        return base_bytes(self.profile, self.cluster.groups[0].device)

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Indices of the recomputation levels that layers may take."""
        return allowed_levels(self.job.space)

    def model(self, axis_order: AxisOrder) -> CostModel:
        """Return the cost model under an axis order."""
        if axis_order not in self._models:
            self._models[axis_order] = CostModel(self.profile, self.cluster, self.job, OPTIONS, axis_order)
        return self._models[axis_order]

    @cached_property
    def classes(self) -> LayerClasses:
        """Which layers are alike."""
        return classes_of(self.profile)

    @cached_property
    def price_list(self) -> PriceList:
        if not self._prices:
            self._prices.append(PriceList.of(self.model(PIPELINE_OUTSIDE), self.classes, float("inf")))
        return self._prices[0].limited(self.capacity_bytes - self.base_bytes)

    @cached_property
    def device_counts(self) -> list[int]:
        """How many devices plans may use."""
        return device_counts(self.num_devices) if self.only_counts is None else list(self.only_counts)

    @cached_property
    def shapes(self) -> Ints:
        """All configurations before the cost model's legality, int32 [n, 12]."""
        per_node = max(group.devices_per_node for group in self.cluster.groups)
        rows = [shapes(self.profile, self.job, count, per_node) for count in self.device_counts]
        return with_equal(np.concatenate(rows), self.job.space.equal)

    @cached_property
    def priced(self) -> Priced:
        """All legal configurations with their costs."""
        return self.price_list.price(self.shapes)

    @cached_property
    def uncut(self) -> tuple[int, ...]:
        """Layers before which no stage may begin: those between the first and the last of each group of tied layers.

        Raises InvalidArgument for a tied name that is no layer of the model.
        """
        position = {name: index for index, name in enumerate(self.profile.layer_names)}
        found: set[int] = set()
        for names in self.job.space.ties:
            unknown = next((name for name in names if name not in position), None)
            if unknown is not None:
                nearest = difflib.get_close_matches(unknown, position, n=1)
                raise InvalidArgument(
                    f"{self.profile.name} has no layer {unknown!r} to tie",
                    field="space.ties",
                    hint=f"did you mean {nearest[0]}?" if nearest else "layers: " + ", ".join(list(position)[:8]),
                )
            places = [position[name] for name in names]
            found.update(range(min(places) + 1, max(places) + 1))
        return tuple(sorted(found))

    @cached_property
    def rules(self) -> list[FamilyRule]:
        """Families the job allows."""
        return allowed_rules(self.job.space)

    def candidates(self, shapes: Ints | None = None) -> list[Candidate]:
        """Return the candidates of some configurations, of all by default, in a fixed order."""
        rows = self.priced.shape if shapes is None else shapes
        return [
            Candidate(configuration, rule, chunks)
            for configuration in map(configuration_of, rows)
            for rule, chunks in schedule_sizes(
                self.rules,
                self.job.space,
                configuration.num_ranks,
                configuration.num_microbatches,
                self.profile.num_layers,
            )
        ]

    def refusals(self) -> list[str]:
        """Return why the cost model refuses degrees that the shape would allow, one reason a choice."""
        model = self.model(PIPELINE_OUTSIDE)
        reasons = []
        for row in self.shapes:
            configuration = configuration_of(row)
            reason = model.legality(configuration.degrees, configuration.microbatch)
            if reason is not None:
                reasons.append(reason)
        return reasons

    def space_words(self) -> dict[str, str | int | float | list[str] | list[int]]:
        """Return the declared space in words and numbers."""
        space = self.job.space
        return {
            "devices": self.device_counts,
            "schedules": [rule.name for rule in self.rules],
            "max_chunks": space.max_chunks,
            "max_microbatch": space.max_microbatch,
            "zero": list(space.zero),
            "recompute": [LEVELS[level].value for level in self.levels],
            "axis_orders": [",".join(axes) for axes in AXIS_ORDERS],
            **({} if np.isinf(self.most_bytes) else {"most_bytes": self.most_bytes}),
            **({"target": space.target} if space.target is not None else {}),
            **({"equal": [" = ".join(pair) for pair in space.equal]} if space.equal else {}),
            "stages": "contiguous layer ranges of at least one layer, uneven",
            "degrees": "equal on all stages",
            "pins": [f"{name}={value}" for name, value in space.pins if value is not None],
            "forbids": [f"{item.name}={item.value}" if item.value else item.name for item in space.forbids],
        }

    def costs(self, configuration: Configuration) -> LayerCosts:
        """Return the layer costs of a configuration."""
        if configuration not in self._costs:
            self._costs[configuration] = layer_costs(self.model(configuration.axis_order), configuration)
        return self._costs[configuration]

    def wiring(self, configuration: Configuration) -> Wiring:
        """Return the links between a configuration's pipeline ranks."""
        key = (configuration, 0)
        if key not in self._wirings:
            self._wirings[key] = wire(
                self.model(configuration.axis_order),
                configuration.degrees,
                device_grid(configuration),
                float(self.costs(configuration).cut_bytes.max()),
                configuration.group,
            )
        return self._wirings[key]

    def order(self, candidate: Candidate) -> Order:
        """Return the compiled order of a candidate's schedule."""
        return ORDERS.exact_order(candidate.key, candidate.rule)

    def order_of(self, key: OrderKey, rule: FamilyRule) -> Order:
        """Return the compiled order of a family at some sizes; raises InvalidArgument when it refuses them."""
        if key not in self._orders:
            self._orders[key] = ORDERS.order(key, rule)
        return self._orders[key]

    def short_order_of(self, key: OrderKey, rule: FamilyRule) -> Order:
        """Return an order of a few microbatches in place of many: quick to make and to simulate."""
        return self.order_of(key if key in self._orders else short_key(key), rule)

    def schedule_of(self, key: OrderKey, rule: FamilyRule) -> Schedule:
        """Return the schedule of a family at some sizes: for the few that are judged by the rich simulator."""
        return ORDERS.schedule(key, rule)

    def outline_of(self, key: OrderKey, rule: FamilyRule) -> Layout | None:
        """Return what is known of a layout before the order is made; None where the rule knows nothing."""
        return None if rule.placement is None else ORDERS.outline(key, rule)

    def layout_of(self, key: OrderKey, rule: FamilyRule) -> Layout:
        """Return who holds what and how much lives at once, at least; raises InvalidArgument when it refuses the sizes.

        Where a family's live vectors repeat from 4 D microbatches on, an order of that many stands for longer ones; where
        they do not, what that order opens with does.
        """
        short = short_key(key)
        known = self._orders.get(key, self._orders.get(short) if rule.steady else None)
        return ORDERS.layout(key, rule) if known is None else known

    def takes(self, candidate: Candidate) -> bool:
        """Tell whether the candidate's family takes its sizes."""
        try:
            self.order(candidate)
        except (InvalidArgument, InvalidSchedule):
            return False
        return True

    def wiring_for(self, configuration: Configuration, reference_bytes: float) -> Wiring:
        """Return the links between a configuration's pipeline ranks, for boundaries of at most `reference_bytes`."""
        return wire(
            self.model(configuration.axis_order),
            configuration.degrees,
            device_grid(configuration),
            reference_bytes,
            configuration.group,
        )

    def tie_seconds(self, configuration: Configuration) -> tuple[tuple[int, int, Floats], ...]:
        """Return the tied layers with the seconds of summing their gradient over any two ranks, [D, D]."""
        degrees, ranks = configuration.degrees, configuration.num_ranks
        if ranks == 1 or not self.profile.trained_ties:
            return ()
        grid = (degrees.tp, degrees.cp, degrees.dp, ranks, configuration.axis_order, configuration.group)
        key = (*grid, degrees.sp, degrees.vocab_parallel)
        if key not in self._ties:
            wiring = self.wiring_for(configuration, 0.0)
            self._ties[key] = tuple(
                (tie.first_layer, tie.second_layer, wiring.sums_s(tie.gradient_bytes))
                for tie in self.ties(configuration)
            )
        return self._ties[key]

    def replica_terms(
        self, configuration: Configuration, placement: Ints, gradient_bytes: Floats
    ) -> tuple[Floats, Floats]:
        """Return the seconds of summing a stage's gradients over its two ranks: of one layer of each class [C], and once [S].

        `gradient_bytes` [C] are a layer's on one device.
        """
        wiring = self.wiring_for(configuration, 0.0)
        unit = float(max(gradient_bytes[self.classes.of_layer].sum(), 1.0))
        first, second = (int(rank) for rank in placement[:, 0][:2])
        whole = wiring.sum_s(first, second, unit)
        latency = 2.0 * wiring.sum_s(first, second, 1.0) - wiring.sum_s(first, second, 2.0)
        return (whole - latency) * gradient_bytes / unit, np.full(placement.shape[1], latency)

    def ties(self, configuration: Configuration) -> list[Tie]:
        """Return the weights that layers share."""
        return ties_of(self.profile, configuration.degrees, self.job)

    def pipeline(self, candidate: Candidate, partition: Partition) -> PipelineCosts:
        """Return the costs of a candidate's stages."""
        order = self.order(candidate)
        return pipeline_costs(
            order,
            partition.bounds,
            partition.levels,
            [self.costs(candidate.configuration)] * order.num_stages,
            self.wiring(candidate.configuration),
            base_bytes=self.base_bytes,
            ties=self.ties(candidate.configuration),
            action_overhead_s=self.profile.action_overhead_s,
        )

    def fits(self, candidate: Candidate, partition: Partition) -> bool:
        """Tell whether the candidate is legal and its stages fit by the search's ledger, which may count more than a plan does."""
        most = self.capacity_bytes * (1 + 1e-12)
        return self.takes(candidate) and bool((self.pipeline(candidate, partition).peak_bytes <= most).all())

    def step_s(self, candidate: Candidate, partition: Partition) -> float:
        """Return the simulated step of a completed candidate, seconds, with links that never wait."""
        pipeline = self.pipeline(candidate, partition)
        makespan = self.order(candidate).makespan(pipeline.costs, pipeline.hop_s, pipeline.tail_s)
        return makespan + self.profile.step_overhead_s

    def judged_step_s(self, candidate: Candidate, partition: Partition) -> float:
        """Return the step of the rich simulator, where a link carries one message at a time; what plans predict."""
        schedule = self.schedule_of(candidate.key, candidate.rule)
        layers = [self.costs(candidate.configuration)] * schedule.num_stages
        timeline = simulate(
            schedule,
            stage_costs(self.pipeline(candidate, partition), partition.bounds, partition.levels, layers),
            links=links_of(self.order(candidate), partition.bounds, layers, self.wiring(candidate.configuration)),
            tail_s=self.pipeline(candidate, partition).tail_s,
            trace=False,
        )
        return timeline.makespan_s + self.profile.step_overhead_s

    def plan(self, candidate: Candidate, partition: Partition, planner: str) -> Plan:
        """Return the plan document of a completed candidate, its prediction still empty."""
        configuration, order = candidate.configuration, self.order(candidate)
        stages = tuple(
            StagePlan(
                layers=(partition.bounds[stage], partition.bounds[stage + 1]),
                degrees=configuration.degrees,
                recompute=recompute_runs(partition.levels[partition.bounds[stage] : partition.bounds[stage + 1]]),
                group=configuration.group or self.cluster.groups[0].name,
            )
            for stage in range(order.num_stages)
        )
        return Plan(
            model=self.profile.name,
            profile_digest=self.profile.digest,
            layer_digest=self.profile.layer_digest,
            num_layers=self.profile.num_layers,
            cluster=self.cluster,
            job=self.job,
            planner=planner,
            stages=stages,
            mapping=RankMapping(axis_order=configuration.axis_order, pipeline_ranks=pipeline_ranks(configuration)),
            schedule=ScheduleSpec(
                name=candidate.rule.name,
                num_ranks=configuration.num_ranks,
                num_microbatches=configuration.num_microbatches,
                microbatch=configuration.microbatch,
                num_chunks=candidate.num_chunks,
                placement=tuple(tuple(row) for row in order.placement.tolist()),
                parameters=dict(candidate.rule.parameters),
            ),
            prediction=NO_PREDICTION,
        )


NO_PREDICTION = Prediction(
    step_time_s=0.0,
    tokens_per_s=0.0,
    samples_per_s=0.0,
    bubble_over_total=0.0,
    peak_memory_bytes=(),
    memory=(),
    source=Source.ANALYTIC,
)


def device_grid(configuration: Configuration) -> npt.NDArray[np.int64]:
    """Return the global rank of each device, [D, tp * cp * dp] in (tp, cp, dp) order, under the axis order."""
    degrees = configuration.degrees
    sizes = {"tp": degrees.tp, "cp": degrees.cp, "dp": degrees.dp, "pp": configuration.num_ranks}
    stride: dict[str, int] = {}
    span = 1
    for axis in configuration.axis_order:
        stride[axis] = span
        span *= sizes[axis]
    grid = (
        np.arange(sizes["dp"])[:, None, None] * stride["dp"]
        + np.arange(sizes["cp"])[None, :, None] * stride["cp"]
        + np.arange(sizes["tp"])[None, None, :] * stride["tp"]
    ).ravel()
    return np.asarray(np.arange(sizes["pp"])[:, None] * stride["pp"] + grid[None, :], dtype=np.int64)


def pipeline_ranks(configuration: Configuration) -> tuple[tuple[int, ...], ...]:
    """Return the global ranks of each pipeline rank, as a plan holds them."""
    return tuple(tuple(row) for row in device_grid(configuration).tolist())


def recompute_runs(levels: tuple[int, ...]) -> tuple[RecomputeRun, ...]:
    """Return the run-length code of a stage's levels; empty when nothing is recomputed."""
    if not any(levels):
        return ()
    runs: list[tuple[int, int]] = []
    for level in levels:
        if runs and runs[-1][0] == level:
            runs[-1] = (level, runs[-1][1] + 1)
        else:
            runs.append((level, 1))
    return tuple(RecomputeRun(level=LEVELS[level], count=count) for level, count in runs)
