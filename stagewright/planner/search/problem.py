"""A planning question compiled for search: configurations priced once, orders compiled once, candidates by index.

`Problem` holds the documents and caches what many candidates share: the cost model of an axis order, the layer costs of
a configuration, the wiring between its ranks, the order of a schedule. Nothing here decides; the planners do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.groups import AxisOrder
from stagewright.planner.cost.layer_table import LEVELS
from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.plan import (
    Degrees,
    Plan,
    Prediction,
    RankMapping,
    RecomputeRun,
    ScheduleSpec,
    StagePlan,
)
from stagewright.planner.documents.profile import ModelProfile, Source
from stagewright.planner.prediction import OPTIONS, base_bytes, ties_of, wire
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.search.layer_costs import Configuration, LayerCosts, layer_costs
from stagewright.planner.search.order import Order, OrderKey, compile_search_order
from stagewright.planner.search.pipeline_costs import PipelineCosts, Tie, Wiring, pipeline_costs
from stagewright.planner.search.space import (
    FamilyRule,
    allowed_levels,
    allowed_rules,
    allows,
    degree_choices,
    device_counts,
    divisors,
    schedule_sizes,
)


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
    """A profile, a cluster and a job, with what searches share."""

    profile: ModelProfile
    cluster: Cluster
    job: TrainingJob
    num_devices: int
    _models: dict[AxisOrder, CostModel] = field(default_factory=dict)
    _costs: dict[Configuration, LayerCosts] = field(default_factory=dict)
    _wirings: dict[tuple[Configuration, int], Wiring] = field(default_factory=dict)
    _orders: dict[OrderKey, Order] = field(default_factory=dict)

    @cached_property
    def capacity_bytes(self) -> float:
        """Bytes a plan may use of a device, the headroom left free."""
        return self.cluster.groups[0].device.memory_bytes * (1.0 - self.job.space.memory_headroom)

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

    def candidates(self) -> list[Candidate]:
        """Return every candidate of the declared space, in a fixed order."""
        rules = allowed_rules(self.job.space)
        found: list[Candidate] = []
        for count in device_counts(self.num_devices, exact=self.job.objective == "min-max-memory"):
            for degrees, ranks in degree_choices(self.profile, self.job, count):
                for configuration in self._batches(degrees, ranks):
                    found += [
                        Candidate(configuration, rule, chunks)
                        for rule, chunks in schedule_sizes(
                            rules, self.job.space, ranks, configuration.num_microbatches, self.profile.num_layers
                        )
                    ]
        return found

    def _batches(self, degrees: Degrees, ranks: int) -> list[Configuration]:
        share = self.job.global_batch // degrees.dp
        found = []
        for microbatch in divisors(share):
            if microbatch > self.job.space.max_microbatch or not allows(self.job.space, "microbatch", microbatch):
                continue
            configuration = Configuration(degrees, ranks, microbatch, share // microbatch)
            if self.model(configuration.axis_order).legality(degrees, microbatch) is None:
                found.append(configuration)
        return found

    def refusals(self, model: CostModel) -> list[str]:
        """Return why the cost model refuses degrees that the shape would allow, one reason a choice."""
        reasons = []
        for count in device_counts(self.num_devices, exact=False):
            for degrees, _ in degree_choices(self.profile, self.job, count):
                reason = model.legality(degrees, 1)
                if reason is not None:
                    reasons.append(reason)
        return reasons

    def space_words(self) -> dict[str, str | int | float | list[str] | list[int]]:
        """Return the declared space in words and numbers."""
        space = self.job.space
        return {
            "devices": device_counts(self.num_devices, exact=False),
            "schedules": [rule.name for rule in allowed_rules(space)],
            "max_chunks": space.max_chunks,
            "max_microbatch": space.max_microbatch,
            "zero": list(space.zero),
            "recompute": [LEVELS[level].value for level in self.levels],
            "axis_orders": ["tp,cp,dp,pp"],
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
                np.array(pipeline_ranks(configuration), dtype=np.int64),
                float(self.costs(configuration).cut_bytes.max()),
                configuration.group,
            )
        return self._wirings[key]

    def order(self, candidate: Candidate) -> Order:
        """Return the compiled order of a candidate's schedule."""
        key = candidate.key
        if key not in self._orders:
            request = ScheduleRequest(
                key.num_ranks,
                key.num_microbatches,
                num_chunks=key.num_chunks,
                parameters=dict(candidate.rule.parameters),
            )
            self._orders[key] = compile_search_order(generate(key.family, request), key)
        return self._orders[key]

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

    def step_s(self, candidate: Candidate, partition: Partition) -> float:
        """Return the simulated step of a completed candidate, seconds, with links that never wait."""
        pipeline = self.pipeline(candidate, partition)
        makespan = self.order(candidate).makespan(pipeline.costs, pipeline.hop_s, pipeline.tail_s)
        return makespan + self.profile.step_overhead_s

    def plan(self, candidate: Candidate, partition: Partition, planner: str) -> Plan:
        """Return the plan document of a completed candidate, its prediction still empty."""
        configuration, order = candidate.configuration, self.order(candidate)
        stages = tuple(
            StagePlan(
                layers=(partition.bounds[stage], partition.bounds[stage + 1]),
                degrees=configuration.degrees,
                recompute=_runs(partition.levels[partition.bounds[stage] : partition.bounds[stage + 1]]),
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
            prediction=_NO_PREDICTION,
        )


_NO_PREDICTION = Prediction(
    step_time_s=0.0,
    tokens_per_s=0.0,
    samples_per_s=0.0,
    bubble_over_total=0.0,
    peak_memory_bytes=(),
    memory=(),
    source=Source.ANALYTIC,
)


def pipeline_ranks(configuration: Configuration) -> tuple[tuple[int, ...], ...]:
    """Return the global ranks of each pipeline rank, in (tp, cp, dp) order, under the configuration's axis order."""
    sizes = {
        "tp": configuration.degrees.tp,
        "cp": configuration.degrees.cp,
        "dp": configuration.degrees.dp,
        "pp": configuration.num_ranks,
    }
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
    ranks: npt.NDArray[np.int64] = np.arange(sizes["pp"])[:, None] * stride["pp"] + grid[None, :]
    return tuple(tuple(row) for row in ranks.tolist())


def _runs(levels: tuple[int, ...]) -> tuple[RecomputeRun, ...]:
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
