"""A candidate's linear program over cuts: stages as layer counts, critical paths as rows.

    min  theta
    s.t. theta >= path_j(F(n, e), I(n, e), W(n), hops, tails(n))      for every cut j of the order
         sum_s n[s, k] = N_k                                          for every run k of equal layers
         lo_r <= sum of n of the largest class over the stages of rank r <= hi_r           caps at the target
         1 <= sum_k n[s, k];  n[s, k] = 0 where run k cannot reach stage s
         sum_l e[s, k, l] <= n[s, k]                                  layers raised above the weakest level
         states + live vectors . bytes + workspace <= capacity        for every rank and up to 4 of its vectors

n and e are real: a relaxation, so its optimum bounds every completion of the candidate from below. The light program has
no e and no memory rows. F, I, W and the tails are linear in n and e; hops take the least tensor that may cross.

The integer programs have whole n and e, or whole sums of them over each rank, all live vectors, the target as ceiling of theta, and for the workspace of rank r

         sum_s sum_{m >= l} e[s, k, m] <= hi_r z[r, l],  z binary      for the largest class k
         workspace = w_0 + sum_l (w_l - w_{l-1})+ z[r, l]

         sum_{t <= s} n[t, k] / N_k >= sum_{t <= s} n[t, k + 1] / N_{k + 1}        runs in the model's order

Still a relaxation (hops are least, and so are workspaces of small classes), but what fractions of layers hide is gone: infeasible
means that nothing of the candidate is below the target. Nodes are limited, and seconds by a deadline only, so answers repeat.

Kelley's method (1960): solve, simulate at the solution, add its critical path as a row, until the bound passes the
target or the simulated point falls below it. HiGHS keeps the basis between solves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import highspy
import numpy as np
import numpy.typing as npt

from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.order import Cut

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

MOST_VECTORS = 4
MOST_NODES = 400
MOST_WHOLE = 250  # columns of a program where all are whole; more take tens of seconds
_INTEGER_GAP = 1e-3  # at which a tree stops: its dual bound counts, not its point

Form = Literal["light", "full", "ranks", "whole"]


@dataclass(frozen=True, eq=False)
class Point:
    """A solution: bound in seconds, layers [S, K], raised layers [S, K, 3] (level 0 unused), and theta at it, seconds.

    Theta is above the bound where a tree was left early, and minus infinity at a point that no program returned.
    """

    bound_s: float
    layers: Floats
    raised: Floats
    theta_s: float = -np.inf

    @property
    def counts(self) -> Floats:
        """Layers by level, [S, K, 3], for the simulator."""
        counts = self.raised.copy()
        counts[:, :, 0] = self.layers - self.raised.sum(axis=2)
        return counts


class CutProgram:
    """The program of one candidate, open for more cuts."""

    def __init__(self, costs: CandidateCosts, *, form: Form, rank_layers: tuple[Longs, Longs] | None = None) -> None:
        self._costs = costs
        self._form = form
        memory = form != "light"
        self._scale = 1.0 / max(float(costs.runs.time_s @ costs.runs.length), 1e-12)
        self._base = int(np.argmax(costs.levels))
        self._raise = [level for level in range(self._base + 1, 3) if costs.levels[level]] if memory else []
        self._solver = highspy.Highs()
        for option, value in (("output_flag", False), ("presolve", "off"), ("threads", 1)):
            self._solver.setOptionValue(option, value)
        self._columns(rank_layers)
        self._rows(rank_layers)
        self.num_cuts = 0
        self.nodes = 0

    @property
    def _is_integer(self) -> bool:
        return self._form in ("ranks", "whole")

    @property
    def _shape(self) -> tuple[int, int]:
        return self._costs.num_stages, self._costs.runs.num_runs

    def _columns(self, rank_layers: tuple[Longs, Longs] | None) -> None:
        """Add theta, then the layers of each run on the stages it reaches, then the raised ones by level."""
        stages, runs = self._shape
        reach = reachable(self._costs)
        self._cells = np.flatnonzero(reach.ravel())
        self._position = np.full(stages * runs, -1, dtype=np.int64)
        self._position[self._cells] = np.arange(len(self._cells))
        whole = 1 + len(self._cells) * (1 + len(self._raise))
        ranks = self._costs.order.num_ranks if self._is_integer else 0
        totals = ranks * (1 + len(self._raise)) if self._form == "ranks" else 0
        count = whole + ranks * len(self._raise) + totals
        upper = np.full(count, np.inf)
        most = np.tile(self._costs.runs.length.astype(np.float64), (stages, 1))
        upper[1:whole] = np.tile(most.ravel()[self._cells], 1 + len(self._raise))
        upper[whole : count - totals] = 1.0
        self._first_switch, self._first_total, self._num_totals = whole, count - totals, totals
        cost = np.zeros(count)
        cost[0] = 1.0
        self._solver.addVars(count, np.zeros(count), upper)
        self._solver.changeColsCost(count, np.arange(count, dtype=np.int32), cost)
        self.num_columns = count
        if self._is_integer:
            columns = np.arange(whole if totals else 1, count, dtype=np.int32)
            kinds = np.full(len(columns), int(highspy.HighsVarType.kInteger), dtype=np.uint8)
            self._solver.changeColsIntegrality(len(columns), columns, kinds)

    def _index(self, stage: int, run: int) -> int:
        """Return the column of a run on a stage, 0 where it cannot stand."""
        return int(1 + self._position[stage * self._shape[1] + run])

    def _raised(self, position: int, stage: int, run: int) -> int:
        return self._index(stage, run) + len(self._cells) * (1 + position)

    def _add(
        self, lower: float, upper: float, index: list[int] | npt.NDArray[np.int32], value: list[float] | Floats
    ) -> None:
        self._solver.addRow(
            lower, upper, len(index), np.asarray(index, dtype=np.int32), np.asarray(value, dtype=np.float64)
        )

    def _rows(self, rank_layers: tuple[Longs, Longs] | None) -> None:
        stages, runs = self._shape
        for run in range(runs):
            number = float(self._costs.runs.length[run])
            self._sum_row(number, number, [(s, run) for s in range(stages)])
        for stage in range(stages):
            self._sum_row(1.0, np.inf, [(stage, k) for k in range(runs)])
        if rank_layers is not None:
            of_class = self._costs.classes.run_class
            bulk = np.flatnonzero(of_class == of_class[self._costs.bulk_run]).tolist()
            for rank, slots in enumerate(self._costs.order.slots):
                cells = [(slot.stage, run) for slot in slots for run in bulk]
                self._sum_row(float(rank_layers[0][rank]), float(rank_layers[1][rank]), cells)
        if self._is_integer:
            self._run_order_rows()
            self._total_rows()
        if self._form != "light":
            self._memory_rows(rank_layers)

    def _run_order_rows(self) -> None:
        """Keep runs in the model's order: a share of run k + 1 at most up to a stage as of run k.

        Layers are contiguous, so either nothing of run k + 1 stands up to the stage or all of run k does.
        """
        length = self._costs.runs.length.astype(np.float64)
        stages, runs = self._shape
        for run in range(runs - 1):
            index: list[int] = []
            value: list[float] = []
            for stage in range(stages - 1):
                for which, sign in ((run, 1.0), (run + 1, -1.0)):
                    column = self._index(stage, which)
                    if column:
                        index.append(column)
                        value.append(sign / length[which])
                self._add(0.0, np.inf, index, value)

    def _total_rows(self) -> None:
        """Sum each rank's layers of the largest class, and its raised ones by level, into whole numbers."""
        if not self._num_totals:
            return
        costs, blocks = self._costs, 1 + len(self._raise)
        of_class = costs.classes.run_class
        bulk = np.flatnonzero(of_class == of_class[costs.bulk_run]).tolist()
        for rank, slots in enumerate(costs.order.slots):
            cells = [self._index(slot.stage, run) for slot in slots for run in bulk if self._index(slot.stage, run)]
            for block in range(blocks):
                index, value = _merged([cell + block * len(self._cells) for cell in cells], [1.0] * len(cells))
                self._add(0.0, 0.0, [*index, self._first_total + rank * blocks + block], [*value, -1.0])

    def _sum_row(self, lower: float, upper: float, cells: list[tuple[int, int]]) -> None:
        """Add a row over the layers of some (stage, run), a cell named twice counting twice."""
        total: dict[int, float] = {}
        for stage, run in cells:
            column = self._index(stage, run)
            if column:
                total[column] = total.get(column, 0.0) + 1.0
        self._add(lower, upper, list(total), list(total.values()))

    def _memory_rows(self, rank_layers: tuple[Longs, Longs] | None) -> None:
        stages, runs = self._shape
        if self._raise:
            for stage in range(stages):
                for run in range(runs):
                    if not self._index(stage, run):
                        continue
                    index = [self._raised(p, stage, run) for p in range(len(self._raise))]
                    self._add(-np.inf, 0.0, [*index, self._index(stage, run)], [1.0] * len(index) + [-1.0])
        costs = self._costs
        scale = 1.0 / max(costs.capacity_bytes, 1.0)
        for rank in range(costs.order.num_ranks):
            most = costs.num_layers if rank_layers is None else int(rank_layers[1][rank])
            least = self._least_workspace(rank)
            room = (costs.capacity_bytes - least) * scale
            if self._is_integer:
                switches, rises = self._workspace_switches(rank, least, most)
                for live in costs.order.live[rank]:
                    index, value = self._bytes_row(rank, live, np.zeros(3))
                    self._add(-np.inf, room, [*index, *switches], np.array([*value, *rises]) * scale)
                continue
            steps = self._workspace_steps(rank, least, most)
            for live in _some(costs.order.live[rank]):
                index, value = self._bytes_row(rank, live, steps)
                self._add(-np.inf, room, index, np.array(value) * scale)

    def _least_workspace(self, rank: int) -> float:
        """Return what the rank's workspace is at least: on every stage stands some layer that reaches it."""
        costs, reach = self._costs, reachable(self._costs)
        workspace = costs.runs.workspace_bytes[costs.levels].min(axis=0)
        sure = [float(workspace[reach[slot.stage]].min()) for slot in costs.order.slots[rank]]
        ends = {0: 0, costs.num_stages - 1: costs.runs.num_runs - 1}
        sure += [float(workspace[ends[slot.stage]]) for slot in costs.order.slots[rank] if slot.stage in ends]
        return max(sure)

    def _workspace_steps(self, rank: int, least: float, most: int) -> Floats:
        """Return bytes that a layer of the largest class at each level adds to the row for its workspace, [3].

        A rank of at most m such layers that recomputes any at level l needs that level's workspace w_l, and e_l / m is at
        most 1 if there are any: with w rising, w >= w_0 + sum_l (w_l - w_{l-1}) (e_l + ... + e_2) / m.
        """
        workspace = self._rising_workspace()
        steps, before = np.zeros(3), least
        for level in self._raise:
            rise = max(float(workspace[level]) - before, 0.0)
            steps[level] = (steps[level - 1] if level > self._base + 1 else 0.0) + rise / max(most, 1)
            before += rise
        return steps

    def _rising_workspace(self) -> Floats:
        """Return what a layer of the largest class at each level or a stronger one needs at least, [3]."""
        workspace = self._costs.runs.workspace_bytes[:, self._costs.bulk_run].copy()
        workspace[~self._costs.levels] = np.inf
        return np.asarray(np.minimum.accumulate(workspace[::-1])[::-1])

    def _workspace_switches(self, rank: int, least: float, most: int) -> tuple[list[int], list[float]]:
        """Tie a binary to each level of the largest class on a rank; return the columns and the bytes each one adds."""
        costs, workspace = self._costs, self._rising_workspace()
        of_class = costs.classes.run_class
        bulk = np.flatnonzero(of_class == of_class[costs.bulk_run]).tolist()
        places = sorted({slot.stage for slot in costs.order.slots[rank]})
        cells = [(stage, run) for stage in places for run in bulk if self._index(stage, run)]
        switches, rises, before = [], [], least
        for position, level in enumerate(self._raise):
            rise = float(workspace[level]) - before
            if rise <= 0.0:
                continue
            column = self._first_switch + rank * len(self._raise) + position
            index = [self._raised(p, stage, run) for p in range(position, len(self._raise)) for stage, run in cells]
            self._add(-np.inf, 0.0, [*index, column], [1.0] * len(index) + [-float(max(most, 1))])
            switches.append(column)
            rises.append(rise)
            before += rise
        return switches, rises

    def _bytes_row(self, rank: int, live: Floats, steps: Floats) -> tuple[list[int], list[float]]:
        runs, of_class = self._costs.runs, self._costs.classes.run_class
        alike = of_class == of_class[self._costs.bulk_run]
        index: list[int] = []
        value: list[float] = []
        for place, slot in enumerate(self._costs.order.slots[rank]):
            each = live[0, place] * runs.kept_bytes + live[1, place] * runs.late_bytes
            for run in range(runs.num_runs):
                if not self._index(slot.stage, run):
                    continue
                index.append(self._index(slot.stage, run))
                value.append(float(runs.state_bytes[run] + each[self._base, run]))
                for position, level in enumerate(self._raise):
                    saved = float(each[level, run] - each[self._base, run])
                    if alike[run]:
                        saved += float(steps[level])
                    if saved != 0.0:
                        index.append(self._raised(position, slot.stage, run))
                        value.append(saved)
        return _merged(index, value)

    def add(self, cut: Cut) -> None:
        """Add a critical path of the order as a row."""
        coefficients, constant = self.row(cut)
        index = np.flatnonzero(coefficients).astype(np.int32)
        self._add(constant, np.inf, index, coefficients[index])
        self.num_cuts += 1

    def row(self, cut: Cut) -> tuple[Floats, float]:
        """Return (coefficients, constant) with coefficients . columns >= constant, scaled: theta minus the path."""
        costs, runs = self._costs, self._costs.runs
        forward, input_grad, weight_grad = cut.counts.astype(np.float64)
        each = forward[:, None] * runs.forward_s + input_grad[:, None] * runs.input_grad_s
        each += weight_grad[:, None] * runs.weight_grad_s + input_grad[:, None] * runs.recompute_s[self._base]
        constant = float(cut.hops @ costs.least_hop_s) + costs.step_overhead_s
        overheads = forward.sum() + input_grad.sum() + (weight_grad.sum() if costs.order.split else 0.0)
        constant += costs.overhead_s * float(overheads)
        constant += float(costs.constant_tail_s[cut.end_rank])
        for slot in costs.order.slots[cut.end_rank]:
            each[slot.stage] += runs.step_s
            constant += costs.stage_latency_s
            if len(costs.replica_s):
                each[slot.stage] += costs.replica_s
                constant += float(costs.replica_latency_s[slot.stage])
        row = np.zeros(self.num_columns)
        row[0] = 1.0
        count = len(self._cells)
        row[1 : 1 + count] = -each.ravel()[self._cells] * self._scale
        for position, level in enumerate(self._raise):
            extra = input_grad[:, None] * (runs.recompute_s[level] - runs.recompute_s[self._base])
            first = 1 + count * (1 + position)
            row[first : first + count] = -extra.ravel()[self._cells] * self._scale
        return row, constant * self._scale

    def below(self, target_s: float, nodes: int, left_s: float) -> Point | None:
        """Return the integer program's best point of at most `target_s` and its dual bound; None when there is none.

        A tree that ends at `nodes`, or at a deadline in `left_s`, without a point returns its bound with an even point.
        """
        self._solver.setOptionValue("presolve", "on")
        self._solver.setOptionValue("mip_rel_gap", _INTEGER_GAP)
        self._solver.setOptionValue("mip_max_nodes", nodes)
        if np.isfinite(left_s):
            self._solver.setOptionValue("time_limit", self._solver.getRunTime() + max(left_s, 0.0))
        self._solver.changeColBounds(0, 0.0, target_s * self._scale)
        self._solver.run()
        status, info = self._solver.getModelStatus(), self._solver.getInfo()
        self.nodes = int(info.mip_node_count)
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        bound_s = float(info.mip_dual_bound) / self._scale
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible.value:
            return replace(self._give_up(), bound_s=bound_s)
        values = np.array(self._solver.getSolution().col_value)
        theta_s = float(values[0]) / self._scale
        if not self._num_totals:
            values = np.round(values)
        return Point(bound_s, self._spread(values, 0), self._spread_raised(values), theta_s)

    def solve(self) -> Point | None:
        """Return the optimum; None when the program has no solution."""
        self._solver.run()
        status = self._solver.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        if status != highspy.HighsModelStatus.kOptimal:
            return self._give_up()
        values = np.array(self._solver.getSolution().col_value)
        theta_s = float(values[0]) / self._scale
        return Point(theta_s, self._spread(values, 0), self._spread_raised(values), theta_s)

    def _spread(self, values: Floats, block: int) -> Floats:
        """Return a block of columns as [S, K]."""
        stages, runs = self._shape
        count = len(self._cells)
        whole = np.zeros(stages * runs)
        whole[self._cells] = np.maximum(values[1 + block * count : 1 + (block + 1) * count], 0.0)
        return whole.reshape(stages, runs)

    def _spread_raised(self, values: Floats) -> Floats:
        raised = np.zeros((*self._shape, 3))
        for position, level in enumerate(self._raise):
            raised[:, :, level] = self._spread(values, 1 + position)
        return raised

    def _give_up(self) -> Point:
        """Return a point without a bound, when the solver stopped for another reason."""
        stages, runs = self._shape
        even = np.tile(self._costs.runs.length / stages, (stages, 1))
        return Point(-np.inf, even, np.zeros((stages, runs, 3)))

    def duals(self) -> Floats:
        """Return the multipliers of the cuts, clipped at zero, [num_cuts]."""
        rows = np.array(self._solver.getSolution().row_dual)
        return np.asarray(np.maximum(rows[len(rows) - self.num_cuts :], 0.0))


def _some(live: Floats) -> Floats:
    """Return a few of a rank's live vectors, evenly spaced: fewer rows are a relaxation, and one mostly binds."""
    if len(live) <= MOST_VECTORS:
        return live
    return np.asarray(live[np.unique(np.linspace(0, len(live) - 1, MOST_VECTORS).astype(int))])


def reachable(costs: CandidateCosts) -> npt.NDArray[np.bool_]:
    """Return which runs can stand on which stages when every stage holds at least one layer, [S, K]."""
    start = costs.classes.run_start.astype(np.int64)
    stage = np.arange(costs.num_stages)[:, None]
    layers, stages = costs.num_layers, costs.num_stages
    return np.asarray((stage <= start[None, 1:] - 1) & (stage >= stages - layers + start[None, :-1]))


def _merged(index: list[int], value: list[float]) -> tuple[list[int], list[float]]:
    """Return the row with equal columns added up (a rank that holds a stage of both replicas)."""
    total: dict[int, float] = {}
    for column, number in zip(index, value, strict=True):
        total[column] = total.get(column, 0.0) + number
    return list(total), list(total.values())
