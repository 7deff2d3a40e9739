"""One candidate of a search by stages: its choices along the pipeline, its order, and what a partition of it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.documents.plan import Degrees, Plan, RankMapping, ScheduleSpec, StagePlan
from stagewright.planner.planned_links import links_of, slowest_inside, ties_of, wire_ranks
from stagewright.planner.prediction import evaluate, stage_costs
from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.search.choice_tables import ChoiceTables, stage_tables
from stagewright.planner.search.joined_choice import Choices, JoinedChoices
from stagewright.planner.search.layer_costs import LayerCosts
from stagewright.planner.search.order import Layout, Order
from stagewright.planner.search.pipeline_costs import PipelineCosts, Tie, Wiring, pipeline_costs, sent_over
from stagewright.planner.search.pools import Pool
from stagewright.planner.search.pricing import MICROBATCH, SHAPE, LayerClasses, configuration_of
from stagewright.planner.search.problem import NO_PREDICTION, Partition, Problem, recompute_runs
from stagewright.planner.search.recompute import LayerGroup, Recomputation, least_recompute
from stagewright.planner.search.space import PIPELINE_OUTSIDE, FamilyRule
from stagewright.planner.search.stage_graph import graph_schedule
from stagewright.planner.search.stage_ranges import StageTables
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.tightest_group import with_tightest_groups

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PoolChoice:
    """A pool, the pipeline ranks it is divided into, and the degrees of each.

    Parameters
    ----------
    shape : int32 [12], a row of `pricing.SHAPE` for one rank; behind it the shares of a joined pool.
    """

    pool: Pool
    num_ranks: int
    choices: Choices
    shape: Ints

    @cached_property
    def degrees(self) -> Degrees:
        return configuration_of(self.shape[: len(SHAPE)]).degrees

    @cached_property
    def costs(self) -> LayerCosts:
        return self.choices.costs(self.shape)

    @cached_property
    def key(self) -> tuple[object, ...]:
        return (self.choices.group, self.shape.tobytes())

    @property
    def batch_shares(self) -> tuple[int, ...]:
        """Samples of a microbatch by replica; empty where one node group holds all of them."""
        if not isinstance(self.choices, JoinedChoices):
            return ()
        return tuple(part.samples for part in self.choices.parts(self.shape) for _ in range(part.num_replicas))

    @property
    def state_shares(self) -> tuple[float, ...]:
        """What each replica holds of the states that ZeRO divides; empty where all hold as much."""
        if not isinstance(self.choices, JoinedChoices):
            return ()
        parts = self.choices.parts(self.shape)
        return tuple(
            part.state_share for part in parts for _ in range(part.num_replicas) if part.state_share is not None
        )

    @cached_property
    def link_group(self) -> str:
        """The node group on whose links tensor-parallel groups are priced."""
        return slowest_inside(self.choices.problem.model(PIPELINE_OUTSIDE), self.degrees, self.pool.groups)

    @property
    def summary(self) -> str:
        """The choice in words."""
        degrees = self.degrees
        parts = [f"{name}={getattr(degrees, name)}" for name in ("dp", "tp", "cp", "ep") if getattr(degrees, name) > 1]
        parts += ["sp"] if degrees.sp else []
        parts += [f"zero={degrees.zero}"] if degrees.zero else []
        parts += [f"shares={':'.join(map(str, self.shape[len(SHAPE) : -1].tolist()))}"] if self.pool.parts else []
        parts += ["states by memory"] if self.state_shares else []
        return f"{self.num_ranks} stages on {self.pool.group} ({' '.join(parts) or 'one device'})"


@dataclass(eq=False)
class Levels:
    """Exact least recomputation of a range of layers under a choice, remembered by counts of equal layers."""

    classes: LayerClasses
    allowed: tuple[int, ...]
    _known: dict[tuple[object, ...], Recomputation | None] = field(default_factory=dict)

    def of(self, choice: PoolChoice, order: Order, rank: int, first: int, end: int) -> list[int] | None:
        """Return the level of each layer of [first, end) with the least seconds that fits; None when none does."""
        kinds, live = self.classes.of_layer[first:end], order.live[rank]
        names, numbers = np.unique(kinds, return_counts=True)
        key = (choice.key, order.defers, live.tobytes(), names.tobytes(), numbers.tobytes())
        if key not in self._known:
            self._known[key] = self._solve(
                choice, choice.costs.workspace_of(order), live, names.tolist(), numbers.tolist()
            )
        found = self._known[key]
        if found is None:
            return None
        left = {
            kind: [level for level, count in zip(self.allowed, counts, strict=True) for _ in range(count)]
            for kind, counts in zip(names.tolist(), found.counts, strict=True)
        }
        return [left[kind].pop() for kind in kinds.tolist()]

    def _solve(
        self, choice: PoolChoice, workspace: Floats, live: Floats, names: list[int], numbers: list[int]
    ) -> Recomputation | None:
        costs, allowed = choice.costs, list(self.allowed)
        groups = []
        budget = choice.choices.room_bytes * (1 + 1e-12)
        for name, count in zip(names, numbers, strict=True):
            layer = int(self.classes.first[name])
            kept = costs.kept_bytes[allowed, layer]
            late = costs.late_bytes[allowed, layer]
            groups.append(
                LayerGroup(
                    count,
                    costs.recompute_s[allowed, layer],
                    live[:, 0, :1] * kept[None, :] + live[:, 1, :1] * late[None, :],
                    workspace[allowed, layer],
                )
            )
            budget -= count * float(costs.static_bytes[layer])
        return least_recompute(groups, np.full(len(live), budget))


@dataclass(eq=False)
class StageCandidate:
    """Choices by pool, samples of a microbatch, and a schedule of one stage a rank.

    Parameters
    ----------
    model : cost model on the plan's cluster, whose groups stand with the used ones first.
    samples : of a microbatch, over all replicas of a stage.
    order : the compiled order; its stages form a chain, or the graph of a `graphpipe` schedule.
    windows : int64 [S + 1, 2], least and largest first layer of each stage, and of the end.
    """

    problem: Problem
    model: CostModel
    choices: tuple[PoolChoice, ...]
    samples: int
    rule: FamilyRule
    order: Order
    windows: Longs
    levels: Levels

    @property
    def layout(self) -> Layout:
        return self.order

    @property
    def is_one(self) -> bool:
        return True

    @property
    def whole(self) -> tuple[int, ...]:
        """Layers before which no stage begins, because they are tied to the one before."""
        return self.problem.uncut

    @cached_property
    def by_stage(self) -> list[PoolChoice]:
        """The choice of each stage."""
        return [choice for choice in self.choices for _ in range(choice.num_ranks)]

    @cached_property
    def devices(self) -> tuple[tuple[int, ...], ...]:
        """Global ranks of each pipeline rank, in (tp, cp, dp) order."""
        cluster, known = self.model.cluster, self.problem.cluster
        shift: dict[str, int] = {}
        for owner, sign in ((cluster, 1), (known, -1)):
            first = 0
            for group in owner.groups:
                shift[group.name] = shift.get(group.name, 0) + sign * first
                first += group.num_devices
        found = []
        for choice in self.choices:
            each: list[tuple[int, ...]] = [()] * choice.num_ranks
            for part in choice.pool.parts or (choice.pool,):
                start, size = part.first + shift[part.group], part.num_devices // choice.num_ranks
                each = [(*row, *range(start + at * size, start + (at + 1) * size)) for at, row in enumerate(each)]
            found += each
        return tuple(found)

    @property
    def num_microbatches(self) -> int:
        return self.problem.job.global_batch // self.samples

    @property
    def summary(self) -> str:
        """The choice in words."""
        return ", ".join(choice.summary for choice in self.choices) + f", microbatch={self.samples} {self.rule.name}"

    @cached_property
    def layers(self) -> list[LayerCosts]:
        return [choice.costs for choice in self.by_stage]

    @cached_property
    def wiring(self) -> Wiring:
        return wire_ranks(
            self.model,
            [(choice.degrees, choice.link_group) for choice in self.by_stage],
            self.devices,
            max(float(choice.costs.cut_bytes.max()) for choice in self.choices),
        )

    @cached_property
    def ties(self) -> list[Tie]:
        """The weights that layers share, as the scorer counts them."""
        each = [ties_of(self.problem.profile, choice.degrees, self.problem.job) for choice in self.choices]
        return max(each, key=lambda ties: sum(tie.gradient_bytes for tie in ties))

    @cached_property
    def base_bytes(self) -> Floats:
        return np.array([choice.choices.problem.base_bytes for choice in self.by_stage])

    @cached_property
    def tables(self) -> StageTables:
        """Prefix sums of the stages for the bounds."""
        allowed, classes = list(self.levels.allowed), self.problem.classes
        return stage_tables(
            [ChoiceTables.of_one(choice.costs, allowed, self.order, classes) for choice in self.choices],
            [choice.num_ranks for choice in self.choices],
            [choice.choices.room_bytes * (1 + 1e-12) for choice in self.choices],
            self.order,
            classes,
        )

    @cached_property
    def hop_s(self) -> Floats:
        """Seconds of a message over each edge when its target starts at a layer, [E, L + 1]."""
        found = np.zeros((len(self.order.edges), self.layers[0].num_layers + 1))
        for index, (edge, (a, b)) in enumerate(zip(self.order.edges, self.order.hop_pairs.tolist(), strict=True)):
            sizes = np.maximum(*(self._sizes(self.layers[end], edge) for end in edge))
            line = self.wiring.line(a, b)
            found[index] = line.latency_s + sizes / line.bytes_per_s
        return found

    def _sizes(self, row: LayerCosts, edge: tuple[int, int]) -> Floats:
        """Return the bytes of one device with these costs over an edge when its target starts at a layer, [L + 1]."""
        if self.order.is_chain:
            return row.cut_bytes
        low, high = self.windows[edge[1]].tolist()
        sizes = np.zeros(row.num_layers + 1)
        if low == high:
            sizes[low] = sent_over(self.order, self.windows[:, 0].tolist(), row, edge)
            return sizes
        # Inside a segment of a stage graph, the layer before a cut feeds the one behind it and no other.
        following = row.edges[:, 1] == row.edges[:, 0] + 1
        sizes[row.edges[following, 1]] = row.edge_bytes[following]
        return sizes

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule that the order was compiled from."""
        if self.order.is_chain:
            return self.problem.schedule_of(self.order.key, self.rule)
        return graph_schedule(self.rule.name, self.order.edges, self.order.num_stages, self.num_microbatches)

    def complete(self, cuts: Sequence[int]) -> Partition | None:
        """Return a partition with its exact least recomputation; None when a stage does not fit."""
        levels: list[int] = []
        for stage, choice in enumerate(self.by_stage):
            found = self.levels.of(choice, self.order, stage, cuts[stage], cuts[stage + 1])
            if found is None:
                return None
            levels += found
        return Partition(tuple(int(cut) for cut in cuts), tuple(levels))

    def pipeline(self, partition: Partition) -> PipelineCosts:
        """Return the costs of the stages of a partition."""
        return pipeline_costs(
            self.order,
            partition.bounds,
            partition.levels,
            self.layers,
            self.wiring,
            base_bytes=self.base_bytes,
            ties=self.ties,
            action_overhead_s=self.problem.profile.action_overhead_s,
        )

    def step_s(self, partition: Partition) -> float:
        """Return the simulated step with links that never wait: at most the scorer's."""
        pipeline = self.pipeline(partition)
        makespan = self.order.makespan(pipeline.costs, pipeline.hop_s, pipeline.tail_s)
        return makespan + self.problem.profile.step_overhead_s

    def may_wait(self, partition: Partition) -> bool:
        """Tell whether a message could find its link busy.

        A rank issues messages to another at the ends of its own actions, so two of them are at least one such action
        apart: where every transfer is shorter, none waits.
        """
        pipeline = self.pipeline(partition)
        backward = pipeline.costs[1] if self.order.split else pipeline.costs[1] + pipeline.costs[2]
        for hop, (source, target) in zip(pipeline.hop_s, self.order.edges, strict=True):
            if hop > pipeline.costs[0, source] or hop > backward[target]:
                return True
        return False

    def judged_step_s(self, partition: Partition) -> float:
        """Return the step of the rich simulator, where a link carries one message at a time."""
        pipeline = self.pipeline(partition)
        timeline = simulate(
            self.schedule,
            stage_costs(pipeline, partition.bounds, partition.levels, self.layers),
            links=links_of(self.order, partition.bounds, self.layers, self.wiring),
            tail_s=pipeline.tail_s,
            trace=False,
        )
        return timeline.makespan_s + self.problem.profile.step_overhead_s

    def scored(self, partition: Partition, planner: str) -> Plan:
        """Return the plan document with the scorer's prediction."""
        plan = with_tightest_groups(self.plan(partition, planner), self.problem.profile)
        return plan.model_copy(update={"prediction": evaluate(plan, self.problem.profile).prediction})

    def plan(self, partition: Partition, planner: str) -> Plan:
        """Return the plan document, its prediction still empty."""
        profile, bounds = self.problem.profile, partition.bounds
        stages = tuple(
            StagePlan(
                layers=(bounds[stage], bounds[stage + 1]),
                degrees=choice.degrees,
                recompute=recompute_runs(partition.levels[bounds[stage] : bounds[stage + 1]]),
                group=choice.pool.groups[0],
                batch_shares=choice.batch_shares,
                state_shares=choice.state_shares,
            )
            for stage, choice in enumerate(self.by_stage)
        )
        return Plan(
            model=profile.name,
            profile_digest=profile.digest,
            layer_digest=profile.layer_digest,
            num_layers=profile.num_layers,
            cluster=self.model.cluster,
            job=self.problem.job,
            planner=planner,
            stages=stages,
            mapping=RankMapping(axis_order=PIPELINE_OUTSIDE, pipeline_ranks=self.devices),
            schedule=ScheduleSpec(
                name=self.rule.name,
                num_ranks=self.order.num_ranks,
                num_microbatches=self.num_microbatches,
                microbatch=int(self.choices[0].shape[MICROBATCH]),
                placement=tuple(tuple(row) for row in self.order.placement.tolist()),
                edges=() if self.order.is_chain else self.order.edges,
                parameters=dict(self.rule.parameters),
            ),
            prediction=NO_PREDICTION,
        )
