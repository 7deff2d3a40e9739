"""The costs of candidates, made when they are first asked for and kept for the search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.search.candidate_costs import CandidateCosts, RunCosts, rank_tables
from stagewright.planner.search.caps import RankTables
from stagewright.planner.search.declared_space import DeclaredSpace
from stagewright.planner.search.order import Layout, Order
from stagewright.planner.search.pricing import AXES, CP, DP, PP, SP, TP, configuration_of
from stagewright.planner.search.work_count import WorkCount

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


@dataclass(eq=False)
class CostStore:
    """What each candidate of a space costs, and the tables of whole layouts for many of them."""

    space: DeclaredSpace
    work: WorkCount
    _costs: dict[int, CandidateCosts] = field(default_factory=dict)
    _lines: dict[tuple[object, ...], tuple[Floats, Floats]] = field(default_factory=dict)

    def of(self, index: int) -> CandidateCosts | None:
        """Return a candidate's costs; None when the family refuses its sizes."""
        if index not in self._costs:
            try:
                order = self.space.problem.order_of(self.space.key(index), self.space.rule(index))
            except (InvalidArgument, InvalidSchedule):
                self.work.count("schedule")
                self.space.bound_s[index] = np.inf
                return None
            self._costs[index] = self._on(index, order)
        return self._costs[index]

    def short_of(self, index: int) -> tuple[CandidateCosts, int] | None:
        """Return a candidate's costs on an order of few microbatches, and how many are left out; None as in `of`."""
        key = self.space.key(index)
        try:
            order = self.space.problem.short_order_of(key, self.space.rule(index))
        except (InvalidArgument, InvalidSchedule):
            return None
        costs, left = self._on(index, order), key.num_microbatches - order.key.num_microbatches
        if left == 0:
            self._costs[index] = costs
        return costs, left

    def least_of(self, indices: Sequence[int]) -> CandidateCosts | None:
        """Return what candidates of one order cost at least, in every second and byte; None when the family refuses its sizes.

        No completion of any of them takes less than the same completion here, or fits where it does not fit here. Sums
        of tied layers and of copies of the weights are free.
        """
        first = self.of(indices[0])
        if first is None:
            return None
        rows, priced, order = self.space.crossed[0][list(indices)], self.space.priced, first.order
        runs = self._run_costs(rows, order)
        lines = {id(line): line for line in (self._hop_lines(row, order) for row in rows.tolist())}.values()
        return replace(
            first,
            runs=runs.least(),
            hop_latency_s=np.min([latency_s for latency_s, _ in lines], axis=0),
            hop_s_per_byte=np.min([s_per_byte for _, s_per_byte in lines], axis=0),
            cut_bytes=np.append(priced.cut_bytes[rows].min(axis=0)[first.classes.of_layer], 0.0),
            stage_latency_s=float(priced.latency_s[rows].min()),
            ties=(),
            replica_s=np.zeros_like(first.replica_s),
            replica_latency_s=np.zeros_like(first.replica_latency_s),
        )

    def _on(self, index: int, order: Order) -> CandidateCosts:
        row = int(self.space.crossed[0][index])
        problem, priced = self.space.problem, self.space.priced
        classes, profile = problem.classes, problem.profile
        cuts = np.append(priced.cut_bytes[row][classes.of_layer], 0.0)
        latency, per_byte = self._hop_lines(row, order)
        replica_s, replica_latency_s = self._replica_terms(row, order)
        return CandidateCosts(
            order=order,
            classes=classes,
            runs=self._run_costs(row, order),
            hop_latency_s=latency,
            hop_s_per_byte=per_byte,
            cut_bytes=cuts,
            stage_latency_s=float(priced.latency_s[row]),
            overhead_s=profile.action_overhead_s,
            constant_tail_s=np.zeros(order.num_ranks),
            ties=problem.tie_seconds(configuration_of(priced.shape[row])),
            replica_s=replica_s,
            replica_latency_s=replica_latency_s,
            capacity_bytes=self.space.room_bytes,
            levels=self.space.levels,
            step_overhead_s=profile.step_overhead_s,
        )

    def _run_costs(self, row: int | Longs, layout: Layout) -> RunCosts:
        """Return what the layers of each run cost under a configuration, or several, on any order with the layout's backwards."""
        priced, classes = self.space.priced, self.space.problem.classes
        of_run = classes.run_class
        return RunCosts(
            length=classes.run_length.astype(np.int64),
            forward_s=priced.forward_s[row].take(of_run, axis=-1),
            input_grad_s=priced.input_grad_s[row].take(of_run, axis=-1),
            weight_grad_s=priced.weight_grad_of(row, layout).take(of_run, axis=-1),
            recompute_s=priced.recompute_s[row].take(of_run, axis=-1),
            kept_bytes=priced.kept_bytes[row].take(of_run, axis=-1),
            late_bytes=priced.late_bytes[row].take(of_run, axis=-1),
            workspace_bytes=priced.workspace_of(defers=layout.defers)[row].take(of_run, axis=-1),
            state_bytes=priced.state_bytes[row].take(of_run, axis=-1),
            step_s=priced.step_s[row].take(of_run, axis=-1),
        )

    def _replica_terms(self, row: int, order: Order) -> tuple[Floats, Floats]:
        if order.num_replicas == 1:
            return np.zeros(0), np.zeros(0)
        problem = self.space.problem
        each_s, once_s = problem.replica_terms(
            configuration_of(self.space.priced.shape[row]), order.placement, self.space.priced.gradient_bytes[row]
        )
        return each_s[problem.classes.run_class], once_s

    def _hop_lines(self, row: int, layout: Layout) -> tuple[Floats, Floats]:
        """Return latency and seconds a byte of each hop."""
        shape, reference_bytes = self.space.priced.shape[row], float(self.space.largest_cut_bytes[row])
        linked = shape[[TP, SP, AXES, CP, DP, PP]].tobytes()
        key = (linked, reference_bytes, layout.placement.shape, layout.placement.tobytes())
        if key not in self._lines:
            wiring = self.space.problem.wiring_for(configuration_of(shape), reference_bytes)
            self._lines[key] = wiring.lines(layout.hop_pairs)
        return self._lines[key]

    def rank_tables(self, row: int | Longs, latency_s: Floats, layout: Layout) -> RankTables:
        """Return a configuration, or several, on the slots of a layout as the caps see it."""
        problem = self.space.problem
        return rank_tables(
            layout,
            problem.classes,
            self._run_costs(row, layout),
            levels=self.space.levels,
            stage_latency_s=latency_s,
            overhead_s=problem.profile.action_overhead_s,
            constant_tail_s=np.zeros(layout.num_ranks),
            capacity_bytes=self.space.room_bytes,
            step_overhead_s=problem.profile.step_overhead_s,
        )
