"""One candidate as numbers: an order, the priced row of its configuration, its hops, and how a cut of it costs.

A completion of a candidate is counts[S, K, 3]: how many layers of each run stand on each stage at each level. Stages
are contiguous, so the counts of the runs, summed over levels, follow from the stage sizes. All costs but workspaces and
hops are linear in the counts. `pipeline_costs` computes the same numbers for one plan; tests hold the two together.
Methods that take counts or bounds take many completions as well, in axes before the ones they name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.caps import RankTables, largest_class
from stagewright.planner.search.completion_tables import CompletionTables
from stagewright.planner.search.order import Cut, Layout, Order
from stagewright.planner.search.pricing import LayerClasses
from stagewright.planner.search.rank_slots import RankSlots

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RunCosts:
    """Costs of one layer of each run, [K] or [3, K], in the terms of `layer_costs`."""

    length: Longs
    forward_s: Floats
    input_grad_s: Floats
    weight_grad_s: Floats
    recompute_s: Floats
    kept_bytes: Floats
    late_bytes: Floats
    workspace_bytes: Floats
    state_bytes: Floats
    step_s: Floats

    @property
    def num_runs(self) -> int:
        return len(self.length)

    @cached_property
    def time_s(self) -> Floats:
        """Seconds of one microbatch without recomputation, [K]."""
        return self.forward_s + self.input_grad_s + self.weight_grad_s

    def least(self) -> RunCosts:
        """Return the least of each cost of several configurations, those of the first axis."""
        costs = (getattr(self, each.name).min(axis=0) for each in fields(self) if each.name != "length")
        return RunCosts(self.length, *costs)


def rank_tables(
    layout: Layout,
    classes: LayerClasses,
    runs: RunCosts,
    *,
    levels: npt.NDArray[np.bool_],
    stage_latency_s: Floats,
    overhead_s: float,
    constant_tail_s: Floats,
    capacity_bytes: float,
    step_overhead_s: float,
) -> RankTables:
    """Return layers on the slots of a layout as the caps see them, names as in `CandidateCosts`."""
    return RankTables(
        placement=layout.placement,
        slot_stage=layout.rank_slots.stage,
        live=layout.rank_slots.live,
        run_start=classes.run_start.astype(np.int64),
        run_class=classes.run_class,
        forward_s=runs.forward_s,
        input_grad_s=runs.input_grad_s,
        weight_grad_s=runs.weight_grad_s,
        recompute_s=runs.recompute_s,
        kept_bytes=runs.kept_bytes,
        late_bytes=runs.late_bytes,
        workspace_bytes=runs.workspace_bytes,
        state_bytes=runs.state_bytes,
        step_s=runs.step_s,
        levels=levels,
        stage_latency_s=stage_latency_s,
        overhead_s=overhead_s,
        split=layout.split,
        constant_tail_s=constant_tail_s,
        capacity_bytes=capacity_bytes,
        step_overhead_s=step_overhead_s,
    )


@dataclass(frozen=True, eq=False)
class CandidateCosts:
    """The costs of one candidate's completions.

    Parameters
    ----------
    hop_latency_s, hop_s_per_byte : lines of the hops, [num_hops].
    cut_bytes : what crosses a cut before each layer, [L + 1].
    stage_latency_s : once a step and stage.
    overhead_s : of every action.
    constant_tail_s : tails that every partition pays: ties between the first and the last stage, [D].
    replica_s : seconds of summing one layer of each run over the two ranks of a stage, [K]; empty for one replica.
    replica_latency_s : once a stage with two replicas, [S].
    capacity_bytes : of a device, less what is there before the first tensor.
    levels : allowed levels, bool [3].
    step_overhead_s : once a step.
    """

    order: Order
    classes: LayerClasses
    runs: RunCosts
    hop_latency_s: Floats
    hop_s_per_byte: Floats
    cut_bytes: Floats
    stage_latency_s: float
    overhead_s: float
    constant_tail_s: Floats
    ties: tuple[tuple[int, int, Floats], ...]
    replica_s: Floats
    replica_latency_s: Floats
    capacity_bytes: float
    levels: npt.NDArray[np.bool_]
    step_overhead_s: float

    @property
    def slots(self) -> RankSlots:
        """What ranks hold."""
        return self.order.rank_slots

    @property
    def num_stages(self) -> int:
        return self.order.num_stages

    @property
    def num_layers(self) -> int:
        return int(self.classes.run_start[-1])

    @cached_property
    def bulk_run(self) -> int:
        """A run of the class with most layers."""
        return int(largest_class(self.classes.run_class, self.runs.length)[0])

    @cached_property
    def reach(self) -> npt.NDArray[np.bool_]:
        """Which runs can stand on which stages when every stage holds at least one layer, [S, K]."""
        start, stages = self.classes.run_start.astype(np.int64), self.num_stages
        stage = np.arange(stages)[:, None]
        return np.asarray((stage <= start[None, 1:] - 1) & (stage >= stages - self.num_layers + start[None, :-1]))

    @cached_property
    def rank_tables(self) -> RankTables:
        """The candidate as the caps see it."""
        return rank_tables(
            self.order,
            self.classes,
            self.runs,
            levels=self.levels,
            stage_latency_s=np.array([self.stage_latency_s]),
            overhead_s=self.overhead_s,
            constant_tail_s=self.constant_tail_s,
            capacity_bytes=self.capacity_bytes,
            step_overhead_s=self.step_overhead_s,
        )

    def layers_of(self, bounds: Sequence[int] | Longs) -> Longs:
        """Return how many layers of each run stand on each stage, [S, K]."""
        start = self.classes.run_start.astype(np.int64)
        cuts = np.asarray(bounds, dtype=np.int64)
        low = np.maximum(cuts[..., :-1, None], start[:-1])
        high = np.minimum(cuts[..., 1:, None], start[1:])
        return np.asarray(np.maximum(high - low, 0))

    def stage_costs(self, counts: Longs) -> Floats:
        """Return seconds of F, I and W of each stage, [3, S]; counts may be fractions."""
        runs, layers = self.runs, counts.sum(axis=-1)
        recompute = np.einsum("...skl,lk->...s", counts, runs.recompute_s)
        weight_overhead_s = self.overhead_s if self.order.split else 0.0
        return np.stack(
            [
                layers @ runs.forward_s + self.overhead_s,
                layers @ runs.input_grad_s + recompute + self.overhead_s,
                layers @ runs.weight_grad_s + weight_overhead_s,
            ],
            axis=-2,
        )

    def hop_seconds(self, bounds: Sequence[int] | Longs) -> Floats:
        """Return the seconds of a message over each hop, [num_hops]."""
        sizes = np.tile(self.cut_bytes[np.asarray(bounds, dtype=np.int64)[..., 1:-1]], self.order.num_replicas)
        return self.hop_latency_s + self.hop_s_per_byte * sizes

    @cached_property
    def least_hop_s(self) -> Floats:
        """Least seconds of each hop over all cuts, [num_hops]."""
        inner = self.cut_bytes[1:-1]
        return self.hop_latency_s + self.hop_s_per_byte * (float(inner.min()) if len(inner) else 0.0)

    def tails(self, layers: Longs, bounds: Sequence[int] | Longs) -> Floats:
        """Return the seconds of each rank behind its last action, [D]."""
        by_stage = layers @ self.runs.step_s + np.where(layers.sum(axis=-1) > 0, self.stage_latency_s, 0.0)
        if len(self.replica_s):
            by_stage = by_stage + layers @ self.replica_s + self.replica_latency_s
        tail = self.constant_tail_s + self.slots.on_ranks(by_stage).sum(axis=-1)
        for first, second, seconds in self.ties:
            tail = tail + self._tie(first, second, seconds, bounds)
        return np.asarray(tail)

    def _tie(self, first: int, second: int, seconds: Floats, bounds: Sequence[int] | Longs) -> Floats:
        ends = np.asarray(bounds, dtype=np.int64)[..., 1:]
        stages = [(ends <= layer).sum(axis=-1) for layer in (first, second)]
        ranks, tail = np.arange(self.order.num_ranks), np.zeros((*ends.shape[:-1], self.order.num_ranks))
        for row in self.order.placement:
            a, b = (np.asarray(row[stage])[..., None] for stage in stages)
            tail += np.where((a != b) & ((ranks == a) | (ranks == b)), seconds[a, b], 0.0)
        return tail

    def peak_bytes(self, counts: Longs, slots: RankSlots | None = None) -> Floats:
        """Return the bytes of each rank above what is there before the first tensor, [D].

        `slots` are those of some ranks, where `counts` are of their stages only.
        """
        runs, slots = self.runs, self.slots if slots is None else slots
        live, on_ranks = slots.live, slots.on_ranks
        kept = on_ranks(np.einsum("...skl,lk->...s", counts, runs.kept_bytes))
        late = on_ranks(np.einsum("...skl,lk->...s", counts, runs.late_bytes))
        workspace = np.where(counts > 0, runs.workspace_bytes.T, 0.0).max(axis=(-2, -1))
        states = counts.sum(axis=-1) @ runs.state_bytes
        active = np.einsum("dnv,...dv->...dn", live[:, :, 0], kept) + np.einsum("dnv,...dv->...dn", live[:, :, 1], late)
        fixed = on_ranks(states).sum(axis=-1)
        return np.asarray(fixed + active.max(axis=-1) + on_ranks(workspace).max(axis=-1))

    def fits(self, counts: Longs) -> bool:
        """Tell whether every rank fits its device."""
        return bool((self.peak_bytes(counts) <= self.capacity_bytes * (1 + 1e-12)).all())

    @cached_property
    def tables(self) -> CompletionTables:
        """The candidate as flat arrays, for compiled evaluation."""
        order, runs, replicated = self.order, self.runs, len(self.replica_s) > 0
        return CompletionTables(
            before=order.before,
            across=order.across,
            hop=order.hop,
            code=order.code,
            last=order.last,
            placement=order.placement,
            slot_stage=self.slots.stage,
            live=self.slots.live,
            run_start=self.classes.run_start.astype(np.int64),
            by_run=np.stack(
                [
                    runs.forward_s,
                    runs.input_grad_s,
                    runs.weight_grad_s,
                    runs.state_bytes,
                    runs.step_s,
                    self.replica_s if replicated else np.zeros(runs.num_runs),
                ]
            ),
            by_level=np.stack([runs.recompute_s, runs.kept_bytes, runs.late_bytes, runs.workspace_bytes]),
            levels=self.levels,
            hop_lines=np.stack([self.hop_latency_s, self.hop_s_per_byte]),
            cut_bytes=self.cut_bytes,
            constant_tail_s=self.constant_tail_s,
            tie_layers=np.array([tie[:2] for tie in self.ties], dtype=np.int64).reshape(-1, 2),
            tie_s=np.array([tie[2] for tie in self.ties]).reshape(-1, order.num_ranks, order.num_ranks),
            replica_latency_s=self.replica_latency_s if replicated else np.zeros(order.num_stages),
            stage_latency_s=self.stage_latency_s,
            overhead_s=self.overhead_s,
            split=order.split,
            capacity_bytes=self.capacity_bytes,
            step_overhead_s=self.step_overhead_s,
            microbatches_each=order.key.num_microbatches / order.num_replicas,
        )

    def may_wait(self, counts: Longs, bounds: Sequence[int] | Longs) -> bool:
        """Tell whether a message could find its link busy, so that the simulated step may exceed `value`.

        A rank issues messages to another at the ends of its own actions, so two of them are at least one such action
        apart: where every transfer is shorter, none waits.
        """
        times, order = self.stage_costs(counts), self.order
        backward = times[1] if order.split else times[1] + times[2]
        sizes = np.tile(self.cut_bytes[np.asarray(bounds, dtype=np.int64)[1:-1]], order.num_replicas)
        busy: dict[tuple[int, int], float] = {}
        apart: dict[tuple[int, int], float] = {}
        for hop, (first, second) in enumerate(order.hop_pairs.tolist()):
            stage = hop % (order.num_stages - 1)
            transfer = float(self.hop_s_per_byte[hop] * sizes[hop])
            for pair, action in (((first, second), times[0][stage]), ((second, first), backward[stage + 1])):
                busy[pair] = max(busy.get(pair, 0.0), transfer)
                apart[pair] = min(apart.get(pair, np.inf), float(action))
        return any(busy[pair] > apart[pair] for pair in busy if pair[0] != pair[1])

    def value(self, counts: Longs, bounds: Sequence[int] | Longs) -> float:
        """Return the simulated step of a completion, with links that never wait."""
        tails = self.tails(counts.sum(axis=2), bounds)
        return self.order.makespan(self.stage_costs(counts), self.hop_seconds(bounds), tails) + self.step_overhead_s

    def trace(self, counts: Longs, bounds: Sequence[int] | Longs) -> tuple[float, Cut]:
        """Return the simulated step and one longest path."""
        tails = self.tails(counts.sum(axis=2), bounds)
        value, cut = self.order.trace(self.stage_costs(counts), self.hop_seconds(bounds), tails)
        return value + self.step_overhead_s, cut

    def levels_of(self, counts: Longs, bounds: Sequence[int] | Longs) -> tuple[int, ...]:
        """Return the level of each layer, the stronger ones first on every stage and run."""
        levels: list[int] = []
        layers = self.layers_of(bounds)
        for stage in range(self.num_stages):
            for run in range(self.runs.num_runs):
                if layers[stage, run]:
                    for level in (2, 1, 0):
                        levels += [level] * int(counts[stage, run, level])
        return tuple(levels)
