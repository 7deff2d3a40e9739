"""The search over device pools: which pools lie along the pipeline, their ranks and degrees, and how layers are cut.

    1  skeletons   a sequence of pools, ranks for each, samples of a microbatch: bounded with every pool at its best
    2  choices     degrees for each pool; a choice that cannot beat the incumbent beside the best of the others leaves
    3  candidates  products of choices with every single-chunk schedule, in order of bound
    4  close       `stage_closing`, with target X = incumbent / (1 + gap)

Rank r starts behind one forward of the layers before it and then works T t_r, so with f the least share of a forward in
a layer's seconds, T t_r + f sum_{q<r} t_q <= step. Weighing rank r with (1 - f/T)^(D-1-r) makes all ranks of a pool alike:
layers [j, i) on its D ranks need at least

    f / (1 - (1 - f/T)^D) sum t   behind the forward of the layers before j,

which is T/D sum t for large T, and at least T times what the rank with most layers of one class has. A chain of pools
costs at least the least maximum over cuts. All bounds hold for every partition and recomputation, so what is left out is
proved to be no better than X; the proved bound is the least of X and the bounds of what a limit left open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.least_work import least_step_s
from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.prediction import OPTIONS
from stagewright.planner.search.joined_choice import Choices, choices_by_group
from stagewright.planner.search.limits import Limits, Termination
from stagewright.planner.search.order import Order, OrderKey
from stagewright.planner.search.pools import Pool, pool_sequences, used_first
from stagewright.planner.search.pricing import Priced
from stagewright.planner.search.problem import Partition, Problem
from stagewright.planner.search.space import PIPELINE_OUTSIDE, FamilyRule, allows, divisors
from stagewright.planner.search.stage_candidate import Levels, PoolChoice, StageCandidate
from stagewright.planner.search.stage_closing import StageCloser
from stagewright.planner.search.stage_graph import (
    MOST_RANKS,
    Edges,
    StageGraph,
    compile_graph_order,
    graph_rules,
    graph_schedule,
    stage_graphs,
)
from stagewright.planner.search.work_count import WorkCount

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

NUM_STARTS = 16
MOST_NODES = 400


@dataclass(frozen=True)
class Skeleton:
    """Pools along the pipeline, pipeline ranks of each, samples of a microbatch; a graph unless stages form a chain."""

    pools: tuple[Pool, ...]
    ranks: tuple[int, ...]
    samples: int
    graph: StageGraph | None = None

    @property
    def num_ranks(self) -> int:
        return sum(self.ranks)


@dataclass(frozen=True, eq=False)
class PoolCosts:
    """What bounds need of some choices, by class of layers, [choices, C]; `share` and `latency_s` [choices].

    Parameters
    ----------
    share : least share of the forward in a layer's seconds.
    least_bytes : states and one microbatch at the level that keeps least.
    """

    time_s: Floats
    forward_s: Floats
    share: Floats
    step_s: Floats
    least_bytes: Floats
    latency_s: Floats

    @classmethod
    def of(cls, priced: Priced, levels: list[int]) -> PoolCosts:
        """Return the costs of priced rows under the allowed recomputation levels."""
        forward = priced.forward_s
        time = forward + priced.input_grad_s + priced.weight_grad_s + priced.recompute_s[:, levels].min(axis=1)
        share = np.divide(forward, time, out=np.ones_like(time), where=time > 0)
        least = priced.state_bytes + priced.kept_bytes[:, levels].min(axis=1)
        return cls(time, forward, share.min(axis=1, initial=1.0), priced.step_s, least, priced.latency_s)

    def together(self) -> PoolCosts:
        """Return one row that is at most every row, none of none."""
        if not len(self.latency_s):
            return self
        return PoolCosts(*(getattr(self, name).min(axis=0, keepdims=True) for name in self.__dataclass_fields__))


@dataclass(frozen=True, eq=False)
class Completed:
    """A completed candidate with its simulated step."""

    step_s: float
    candidate: StageCandidate
    partition: Partition


@dataclass(eq=False)
class PoolSearch:
    """The state of one search.

    Parameters
    ----------
    split : cut one kind of device in two pools as well.
    chains : search chains of stages; else graphs of stages alone.
    known_s : a step that is known to be reached.
    """

    problem: Problem
    limits: Limits
    split: bool = False
    chains: bool = True
    known_s: float = float("inf")
    best: Completed | None = None
    kept: dict[str, Completed] = field(default_factory=dict)
    work: WorkCount = field(default_factory=WorkCount)
    num_candidates: int = 0
    open_bound_s: float = float("inf")
    _models: dict[tuple[str, ...], CostModel] = field(default_factory=dict)
    _costs: dict[tuple[str, int, int, bool], PoolCosts] = field(default_factory=dict)
    _graphs: dict[int, list[StageGraph | None]] = field(default_factory=dict)
    _graph_orders: dict[tuple[str, Edges, int], Order] = field(default_factory=dict)

    @cached_property
    def sequences(self) -> list[tuple[Pool, ...]]:
        return pool_sequences(self.problem.cluster, split=self.split, join=self.joins)

    @cached_property
    def joins(self) -> bool:
        """Whether pools of several node groups are searched: experts are not split over them."""
        shape = self.problem.profile.architecture
        return shape is None or not shape.num_experts

    @cached_property
    def choices(self) -> dict[str, Choices]:
        """Degrees and costs by node group, and by joined pool."""
        return choices_by_group(self.problem, {pool for pools in self.sequences for pool in pools})

    @cached_property
    def rules(self) -> list[FamilyRule]:
        """The families of one stage a rank."""
        return single_chunk(self.problem.rules)

    @cached_property
    def levels(self) -> Levels:
        return Levels(self.problem.classes, self.problem.levels)

    @property
    def incumbent_s(self) -> float:
        return min(self.known_s, self.best.step_s if self.best is not None else float("inf"))

    @property
    def target_s(self) -> float:
        """A candidate that cannot get below this is closed."""
        return self.incumbent_s / (1.0 + self.limits.gap)

    # ---- the space -------------------------------------------------------------------------------------------------

    def skeletons(self) -> Iterator[Skeleton]:
        """Yield every skeleton in a fixed order."""
        job, layers = self.problem.job, self.problem.profile.num_layers - len(self.problem.uncut)
        for pools in self.sequences:
            for ranks in product(*(pool.rank_counts for pool in pools)):
                if sum(ranks) > layers or not allows(job.space, "pp", sum(ranks)):
                    continue
                if not allows(job.space, "chunks", 1):
                    continue
                sizes = [pool.num_devices // count for pool, count in zip(pools, ranks, strict=True)]
                if self.split and len(pools) > 1 and not _aligned(pools, sizes, self.problem):
                    continue
                for graph in self.graphs(sum(ranks)):
                    for samples in divisors(job.global_batch):
                        yield Skeleton(pools, ranks, samples, graph)

    def graphs(self, num_ranks: int) -> list[StageGraph | None]:
        """Return the stage graphs of a depth, None for the chain; others only for a model that is no chain."""
        if num_ranks not in self._graphs:
            branching = num_ranks <= MOST_RANKS and self.side_by_side
            found = stage_graphs(self.problem.profile, num_ranks) if branching else ()
            self._graphs[num_ranks] = [*([None] if self.rules and self.chains else []), *found]
        return self._graphs[num_ranks]

    @cached_property
    def side_by_side(self) -> bool:
        """Tell whether the model has branches and the job admits a schedule that runs them side by side."""
        return bool(self.graph_rules) and not self.problem.profile.is_chain

    @cached_property
    def graph_rules(self) -> list[FamilyRule]:
        """The families of stage graphs."""
        return graph_rules(self.problem.job.space)

    def rows(self, skeleton: Skeleton) -> list[tuple[Choices, Priced, Longs]]:
        """Return for each pool its choices and the rows of them that take the skeleton's microbatch."""
        found = []
        for pool, count in zip(skeleton.pools, skeleton.ranks, strict=True):
            group = self.choices[pool.group]
            priced, samples = group.priced(pool.num_devices // count)
            found.append((group, priced, np.flatnonzero(samples == skeleton.samples)))
        return found

    # ---- bounds of pools -------------------------------------------------------------------------------------------

    def needs(self, skeleton: Skeleton, *, together: bool = False) -> list[Floats] | None:
        """Return what each choice of each pool needs for layers [j, i), [choices, L + 1, L + 1]; None without a choice.

        With `together`, one row a pool that bounds all of its choices: each layer at the least of any of them.
        """
        of_layer = self.problem.classes.of_layer
        microbatches = self.problem.job.global_batch // skeleton.samples
        found = []
        head = np.zeros(len(of_layer) + 1)
        ahead = np.full(len(of_layer), np.inf)
        for pool, count in zip(skeleton.pools, skeleton.ranks, strict=True):
            costs = self._pool_costs(pool.group, pool.num_devices // count, skeleton.samples, together)
            if not len(costs.latency_s):
                return None
            need = pool_needs(
                costs.time_s[:, of_layer],
                costs.share,
                costs.step_s[:, of_layer],
                costs.least_bytes[:, of_layer],
                of_layer.astype(np.int64),
                costs.latency_s + 2.0 * microbatches * self.problem.profile.action_overhead_s,
                microbatches,
                count,
                self.choices[pool.group].room_bytes,
                chain=skeleton.graph is None,
            )
            found.append(need if skeleton.graph is not None else need + head[None, :, None])
            ahead = np.minimum(ahead, costs.forward_s[:, of_layer].min(axis=0))
            head = np.concatenate((np.zeros(1), np.cumsum(ahead)))
        return found

    def _pool_costs(self, name: str, num_devices: int, samples: int, together: bool) -> PoolCosts:
        key = (name, num_devices, samples, together)
        if key not in self._costs:
            priced, of_row = self.choices[name].priced(num_devices)
            each = PoolCosts.of(priced.take(np.flatnonzero(of_row == samples)), list(self.problem.levels))
            self._costs[key] = each.together() if together else each
        return self._costs[key]

    # ---- candidates ------------------------------------------------------------------------------------------------

    def candidate(self, skeleton: Skeleton, chosen: Sequence[int], rule: FamilyRule) -> StageCandidate | None:
        """Return a candidate; None when the family refuses its sizes."""
        order = self.order(skeleton, rule)
        if order is None:
            self.work.count("schedule")
            return None
        choices = tuple(
            PoolChoice(pool, count, group, priced.shape[row])
            for pool, count, (group, priced, _), row in zip(
                skeleton.pools, skeleton.ranks, self.rows(skeleton), chosen, strict=True
            )
        )
        return StageCandidate(
            self.problem,
            self.model(skeleton.pools),
            choices,
            skeleton.samples,
            rule,
            order,
            windows_of(skeleton, self.problem.profile.num_layers),
            self.levels,
        )

    def order(self, skeleton: Skeleton, rule: FamilyRule) -> Order | None:
        """Return the compiled order of a family; None when the family refuses its sizes."""
        if skeleton.graph is not None:
            return self._graph_order(rule.name, skeleton.graph, self.problem.job.global_batch // skeleton.samples)
        key = OrderKey(rule.name, skeleton.num_ranks, self.problem.job.global_batch // skeleton.samples, 1)
        try:
            return self.problem.order_of(key, rule)
        except (InvalidArgument, InvalidSchedule):
            return None

    def _graph_order(self, family: str, graph: StageGraph, num_microbatches: int) -> Order:
        key = (family, graph.edges, num_microbatches)
        if key not in self._graph_orders:
            self._graph_orders[key] = compile_graph_order(
                graph_schedule(family, graph.edges, graph.num_stages, num_microbatches)
            )
        return self._graph_orders[key]

    def model(self, pools: tuple[Pool, ...]) -> CostModel:
        """Return the cost model of the cluster with the used groups first."""
        cluster = used_first(self.problem.cluster, pools)
        key = tuple(group.name for group in cluster.groups)
        if key not in self._models:
            self._models[key] = CostModel(self.problem.profile, cluster, self.problem.job, OPTIONS, PIPELINE_OUTSIDE)
        return self._models[key]

    def keep(self, candidate: StageCandidate, partition: Partition, step_s: float) -> None:
        """Note a simulated partition that may be the new incumbent, with its step on links that messages wait for."""
        if step_s >= self.incumbent_s:
            return
        if candidate.may_wait(partition):
            step_s = max(step_s, candidate.judged_step_s(partition))
        known = self.kept.get(candidate.summary)
        if known is None or step_s < known.step_s:
            self.kept[candidate.summary] = Completed(step_s, candidate, partition)
        if step_s < self.incumbent_s:
            self.best = self.kept[candidate.summary]

    # ---- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> tuple[float, Termination]:
        """Search; return the proved bound over the space and why the search ended."""
        bounded = self._bounded_skeletons()
        self._find_incumbents(bounded)
        stopped: Termination | None = None
        for place, (bound_s, skeleton) in enumerate(bounded):
            if bound_s >= self.target_s:
                self.work.count("pool bound", len(bounded) - place)
                break
            stopped = self.limits.reached()
            if stopped is not None:
                self.open_bound_s = min(self.open_bound_s, bound_s)
                break
            self._search(skeleton, bound_s)
            self.limits.report("pools", place + 1, len(bounded), self.best.step_s if self.best else None, bound_s)
        proved = min(self.open_bound_s, self.target_s)
        if stopped is None and self.open_bound_s < self.target_s:
            stopped = self.limits.reached() or "time_limit"
        return proved, stopped or "gap"

    def _find_incumbents(self, bounded: Sequence[tuple[float, Skeleton]]) -> None:
        """Complete the skeletons of least bound and idle time, each at the choices of its bound, under every family."""

        def guess(pair: tuple[float, Skeleton]) -> float:
            microbatches = self.problem.job.global_batch / pair[1].samples
            return pair[0] * (1.0 + 0.5 * (pair[1].num_ranks - 1) / microbatches)

        for _, skeleton in sorted(bounded, key=guess)[:NUM_STARTS]:
            needs = self.needs(skeleton)
            assert needs is not None
            chosen = _best_choices(needs)
            rows = self.rows(skeleton)
            at = [int(rows[pool][2][index]) for pool, index in enumerate(chosen)]
            for rule in self.rules_for(skeleton):
                if self.limits.reached() is not None:
                    return
                candidate = self.candidate(skeleton, at, rule)
                if candidate is not None:
                    closer = self._closer(candidate, most_nodes=1)
                    closer.run()
                    self.work.simulated += closer.simulated

    def _bounded_skeletons(self) -> list[tuple[float, Skeleton]]:
        """Return the skeletons that may hold the model, by bound."""
        found = []
        extra_s = self.problem.profile.step_overhead_s
        known: dict[tuple[object, ...], float] = {}
        for skeleton in self.skeletons():
            if self.limits.reached() is not None:
                cluster = self.problem.cluster
                self.open_bound_s = least_step_s(self.problem.model(PIPELINE_OUTSIDE), cluster.num_devices)
                break
            key = (skeleton.pools, skeleton.ranks, skeleton.samples, skeleton.graph is None)
            if key not in known:
                needs = self.needs(skeleton, together=True)
                known[key] = float("nan") if needs is None else float(_forward([n[0] for n in needs])[-1][-1]) + extra_s
            if np.isnan(known[key]):
                continue
            numbers = [
                len(self._pool_costs(pool.group, pool.num_devices // count, skeleton.samples, False).latency_s)
                for pool, count in zip(skeleton.pools, skeleton.ranks, strict=True)
            ]
            self.num_candidates += int(np.prod(numbers)) * len(self.rules_for(skeleton))
            if np.isfinite(known[key]):
                found.append((known[key], skeleton))
            else:
                self.work.count("memory")
        found.sort(key=lambda pair: pair[0])
        return found

    def rules_for(self, skeleton: Skeleton) -> list[FamilyRule]:
        """Return the families that take the skeleton's sizes; on one rank the first, since orders do not matter."""
        if skeleton.graph is not None:
            return self.graph_rules
        count = self.problem.job.global_batch // skeleton.samples
        fitting = [rule for rule in self.rules if rule.fits(skeleton.num_ranks, count, 1)]
        return fitting[:1] if skeleton.num_ranks == 1 else fitting

    def _search(self, skeleton: Skeleton, bound_s: float) -> None:
        """Search one skeleton: products of choices in order of bound, each with every family."""
        needs = self.needs(skeleton)
        assert needs is not None
        extra_s = self.problem.profile.step_overhead_s
        products = products_below(needs, self.target_s - extra_s)
        self.work.count("choice bound", int(np.prod([len(need) for need in needs])) - len(products))
        rows = self.rows(skeleton)
        for value, chosen in products:
            for rule in self.rules_for(skeleton):
                if max(value + extra_s, bound_s) >= self.target_s:
                    self.work.count("choice bound")
                    continue
                if self.limits.reached() is not None:
                    self.open_bound_s = min(self.open_bound_s, max(value + extra_s, bound_s))
                    return
                at = [int(rows[pool][2][index]) for pool, index in enumerate(chosen)]
                candidate = self.candidate(skeleton, at, rule)
                if candidate is not None:
                    self._close(candidate)

    def _closer(self, candidate: StageCandidate, *, most_nodes: int = MOST_NODES) -> StageCloser:
        return StageCloser(
            candidate,
            target_s=lambda: self.target_s,
            found=lambda partition, step_s: self.keep(candidate, partition, step_s),
            should_stop=lambda: self.limits.reached() is not None,
            most_nodes=most_nodes,
        )

    def _close(self, candidate: StageCandidate) -> None:
        closer = self._closer(candidate)
        value = closer.run()
        self.work.evaluated += 1
        self.work.simulated += closer.simulated
        if value < self.target_s:
            self.open_bound_s = min(self.open_bound_s, value)
            self.work.count("left open")


def single_chunk(rules: Sequence[FamilyRule]) -> list[FamilyRule]:
    """Return the families that place one stage on each rank, once."""
    return [rule for rule in rules if rule.num_replicas == 1 and tuple(rule.chunks(8)) == (1,)]


def windows_of(skeleton: Skeleton, num_layers: int) -> Longs:
    """Return where each stage of a skeleton may start, int64 [S + 1, 2]."""
    if skeleton.graph is not None:
        return np.array(skeleton.graph.windows, dtype=np.int64)
    return chain_windows(skeleton.num_ranks, num_layers)


def chain_windows(num_stages: int, num_layers: int) -> Longs:
    """Return where each stage may start, each stage holding at least one layer, int64 [S + 1, 2]."""
    stage = np.arange(num_stages + 1)
    return (
        np.stack((np.where(stage < num_stages, stage, num_layers), num_layers - (num_stages - stage)), axis=1)
        * (stage > 0)[:, None]
    )


def pool_needs(
    time_s: Floats,
    share: Floats,
    step_s: Floats,
    least_bytes: Floats,
    class_of: Longs,
    constant_s: Floats,
    num_microbatches: int,
    num_ranks: int,
    room_bytes: float,
    *,
    chain: bool = True,
) -> Floats:
    """Return the least seconds that layers [j, i) take on `num_ranks` ranks, [choices, L + 1, L + 1].

    Ranks that form no `chain` need not wait for each other, so theirs is T/D of the sum. `share` [choices] is the least
    share of a forward in a layer; other arrays are [choices, L]. Infinite for fewer layers than ranks, or where states
    and one microbatch never fit; an empty range is not allowed, because a pool that is there is used.
    """
    num_layers = time_s.shape[1]
    share = share if chain else np.zeros_like(share)
    left = 1.0 - share / num_microbatches
    waits = share > 1e-9
    shrink = np.where(waits, -np.expm1(num_ranks * np.log(np.maximum(left, 1e-300))), 1.0)
    weight = np.where(waits, (1.0 - left) / shrink, 1.0 / num_ranks)
    factor = weight * num_microbatches
    between = _between(factor[:, None] * time_s)
    # A rank's tail counts with its own weight, at least the first rank's.
    between += _between(step_s * (weight * left ** (num_ranks - 1))[:, None])
    needed = between
    if num_ranks > 1:
        for kind in np.unique(class_of):
            numbers = np.concatenate((np.zeros(1), np.cumsum(class_of == kind)))
            most = np.ceil((numbers[None, :] - numbers[:, None]) / num_ranks)
            layer = int(np.flatnonzero(class_of == kind)[0])
            each = num_microbatches * time_s[:, layer] + step_s[:, layer]
            np.maximum(needed, most[None, :, :] * each[:, None, None], out=needed)
    size = np.arange(num_layers + 1)
    short = (size[None, :] - size[:, None]) < num_ranks
    full = _between(least_bytes) > num_ranks * room_bytes * (1 + 1e-12)
    needed += constant_s[:, None, None]
    needed[full | short[None, :, :]] = np.inf
    return needed


def _between(each: Floats) -> Floats:
    """Return the sums over layers [j, i) of [choices, L], [choices, L + 1, L + 1]."""
    before = np.zeros((each.shape[0], each.shape[1] + 1))
    np.cumsum(each, axis=1, out=before[:, 1:])
    return before[:, None, :] - before[:, :, None]


def _best_choices(needs: Sequence[Floats]) -> list[int]:
    """Return the choice of each pool on the cut of least maximum over pools at their best."""
    best = [need.min(axis=0) for need in needs]
    before = _forward(best)
    end, chosen = best[0].shape[0] - 1, []
    for index in range(len(needs) - 1, -1, -1):
        first = int(np.argmin(np.maximum(before[index], best[index][:, end])))
        chosen.append(int(np.argmin(needs[index][:, first, end])))
        end = first
    return chosen[::-1]


def _forward(needs: Sequence[Floats]) -> list[Floats]:
    """Return the least maximum over the first pools when they hold the layers before each place, one row a pool."""
    found = [np.concatenate((np.zeros(1), np.full(needs[0].shape[0] - 1, np.inf)))]
    for need in needs:
        found.append(np.maximum(found[-1][:, None], need).min(axis=0))
    return found


def _backward(needs: Sequence[Floats]) -> list[Floats]:
    """Return the least maximum over the pools from each one on when they hold the layers from each place on."""
    found = [np.concatenate((np.full(needs[0].shape[0] - 1, np.inf), np.zeros(1)))]
    for need in reversed(needs):
        found.append(np.maximum(found[-1][None, :], need).min(axis=1))
    return found[::-1]


def products_below(needs: Sequence[Floats], target_s: float) -> list[tuple[float, tuple[int, ...]]]:
    """Return the products of choices whose bound is below the target, by bound."""
    best = [need.min(axis=0) for need in needs]
    before, behind = _forward(best), _backward(best)
    left: list[list[int]] = []
    for index, need in enumerate(needs):
        value = np.maximum(np.maximum(before[index][None, :, None], need), behind[index + 1][None, None, :])
        left.append(np.flatnonzero(value.min(axis=(1, 2)) < target_s).tolist())
    found: list[tuple[float, tuple[int, ...]]] = []
    for chosen in product(*left):
        least_s = float(_forward([need[row] for need, row in zip(needs, chosen, strict=True)])[-1][-1])
        if least_s < target_s:
            found.append((least_s, chosen))
    found.sort()
    return found


def _aligned(pools: Sequence[Pool], sizes: Sequence[int], problem: Problem) -> bool:
    """Tell whether the ranks of every pool spread over as few units of every link level as the first devices would.

    The cost model prices a rank's groups at the start of its node group.
    """
    for pool, size in zip(pools, sizes, strict=True):
        for level in problem.cluster.groups[0].links:
            unit = level.num_devices
            for start in range(pool.first, pool.first + pool.num_devices, size):
                if (start + size - 1) // unit - start // unit != (size - 1) // unit:
                    return False
    return True
