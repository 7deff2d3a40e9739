"""A candidate's linear program over cuts: stages as layer counts, critical paths as rows.

    min  theta
    s.t. theta >= path_j(F(n, e), I(n, e), W(n), hops, tails(n))      for every cut j of the order
         sum_s n[s, k] = N_k                                          for every run k of equal layers
         lo_r <= sum of n of the largest class over the stages of rank r <= hi_r           caps at the target
         1 <= sum_k n[s, k];  n[s, k] = 0 where run k cannot reach stage s      a column's limit where one run reaches it
         sum_l e[s, k, l] <= n[s, k]                                  layers raised above the weakest level
         states + live vectors . bytes + workspace <= capacity        for every rank and each of its vectors

         rho_r >= lower convex hull of the least recomputation of lo_r, .., hi_r whole layers on rank r

n and e are real: a relaxation, so its optimum bounds every completion of the candidate from below. rho_r, the seconds of
recomputation of a microbatch on rank r, is sum_s sum_l e[s, k, l] rho_l; its hull (`caps.recompute_floors`) knows that layers
and workspaces are whole. The light program has no e and no memory rows: rho_r is a column, and a path pays it as often
as it visits the stage of r that it visits least, over the number of replicas, each of which would count the stage again.
F, I, W and the tails are linear in n and e; hops take the least tensor that may cross.

The whole program is the one that `branching` branches on. It has for the workspace of rank r

         sum_s sum_{m >= l} e[s, k, m] <= hi_r z[r, l],  z binary      for the largest class k
         workspace = w_0 + sum_l (w_l - w_{l-1})+ z[r, l]

         sum_{t <= s} n[t, k] / N_k >= sum_{t <= s} n[t, k + 1] / N_{k + 1}        runs in the model's order

and names what is whole in every completion (`wholes`): n, e, z, and the sums of n and e over stages and ranks. Alone it is
another linear program; with all of these whole it is still a relaxation, because hops are least and so are the workspaces of
small classes.

Kelley's method (1960): solve, simulate at the solution, add its critical path as a row, until the bound passes the
target or the simulated point falls below it. An order knows hundreds of paths of which few bind, as few memory rows do;
the solver (`dual_simplex`) looks at those that its solution misses, and its bounds are those of its multipliers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.caps import recompute_floors
from stagewright.planner.search.linear_program import LinearProgram
from stagewright.planner.search.order import Cut

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

MOST_LISTED = 80  # layers of a rank up to which every number is tried
_FAR = 16.0  # times the target, where theta ends
_LONGEST = 1e7  # passes of a microbatch: no step takes as long

Form = Literal["light", "full", "whole"]

# What is whole, in the order in which it decides most.
ENDS, RANKS, SWITCHES, RAISED_ON_RANKS, STAGES, RAISED, CELLS = range(7)


class Wholes(NamedTuple):
    """Variables that are whole in every completion, [n] each: kind, which, and limits.

    ENDS are layers of small classes on a stage, RANKS layers of the largest class on a rank, SWITCHES workspaces,
    RAISED_ON_RANKS raised layers of the largest class on a rank, STAGES all layers of a stage (a column where one run
    reaches it), RAISED and CELLS columns.
    """

    kind: Longs
    variable: Longs
    low: Floats
    high: Floats


@dataclass(frozen=True, eq=False)
class Point:
    """A solution: bound in seconds, layers [S, K], raised layers [S, K, 3] (level 0 unused).

    `extra_s` [S] is recomputation of a microbatch on each stage that no raised layer stands for.
    """

    bound_s: float
    layers: Floats
    raised: Floats
    extra_s: float | Floats = 0.0

    @property
    def counts(self) -> Floats:
        """Layers by level, [S, K, 3], for the simulator."""
        counts = self.raised.copy()
        counts[:, :, 0] = self.layers - self.raised.sum(axis=2)
        return counts


def between(first: Point, second: Point, share: float) -> Point:
    """Return a share of one point and the rest of another one, without a bound."""
    return Point(
        -np.inf,
        share * first.layers + (1 - share) * second.layers,
        share * first.raised + (1 - share) * second.raised,
        extra_s=share * first.extra_s + (1 - share) * second.extra_s,
    )


class CutProgram:
    """The program of one candidate below a target, open for more cuts."""

    def __init__(
        self, costs: CandidateCosts, *, form: Form, target_s: float, rank_layers: tuple[Longs, Longs] | None = None
    ) -> None:
        self._costs = costs
        self._form = form
        memory = form != "light"
        self._scale = 1.0 / max(float(costs.runs.time_s @ costs.runs.length), 1e-12)
        self._base = int(np.argmax(costs.levels))
        self._raise = [level for level in range(self._base + 1, 3) if costs.levels[level]] if memory else []
        self._floors = None if rank_layers is None else _floor_lines(costs, rank_layers)
        self.stop_at(target_s)
        self._columns(rank_layers)
        self._rows(rank_layers)
        self.cuts: list[Cut] = []
        self._first_cut = self._solver.num_rows
        self.values = np.zeros(self.num_columns)

    @property
    def _shape(self) -> tuple[int, int]:
        return self._costs.num_stages, self._costs.runs.num_runs

    def _columns(self, rank_layers: tuple[Longs, Longs] | None) -> None:
        """Add theta, then the layers of each run on the stages it reaches, then the raised ones by level."""
        stages, runs = self._shape
        reach = reachable(self._costs)
        self._shared = np.flatnonzero(reach.sum(axis=1) > 1)  # stages that several runs reach
        self._cells = np.flatnonzero(reach.ravel())
        self._position = np.full(stages * runs, -1, dtype=np.int64)
        self._position[self._cells] = np.arange(len(self._cells))
        whole = 1 + len(self._cells) * (1 + len(self._raise))
        ranks = self._costs.order.num_ranks if self._form == "whole" else 0
        self._num_floors = 0 if self._form != "light" or self._floors is None else self._costs.order.num_ranks
        count = whole + ranks * len(self._raise) + self._num_floors
        upper = np.ones(count)
        upper[0] = _FAR * self._limit
        most = np.tile(self._costs.runs.length.astype(np.float64), (stages, 1))
        upper[1:whole] = np.tile(most.ravel()[self._cells], 1 + len(self._raise))
        if self._num_floors:
            assert self._floors is not None
            upper[whole:] = self._floors.most * self._scale
        lower = np.zeros(count)
        lower[1 : 1 + len(self._cells)] = ~np.isin(self._cells // runs, self._shared)
        self._first_switch = whole
        cost = np.zeros(count)
        cost[0] = 1.0
        self._solver = LinearProgram(lower, upper, cost)
        self.num_columns = count

    def _index(self, stage: int, run: int) -> int:
        """Return the column of a run on a stage, 0 where it cannot stand."""
        return int(1 + self._position[stage * self._shape[1] + run])

    def _raised(self, position: int, stage: int, run: int) -> int:
        return self._index(stage, run) + len(self._cells) * (1 + position)

    def _rows(self, rank_layers: tuple[Longs, Longs] | None) -> None:
        costs, count = self._costs, len(self._cells)
        runs = self._shape[1]
        stage_of, run_of = self._cells // runs, self._cells % runs
        layers = slice(1, 1 + count)
        self._has_rank_rows = rank_layers is not None
        whole = np.zeros((runs, self.num_columns))
        whole[run_of, 1 + np.arange(count)] = 1.0
        number = costs.runs.length.astype(np.float64)
        some = np.zeros((len(self._shared), self.num_columns))
        some[:, layers] = self._shared[:, None] == stage_of
        blocks = [(whole, number, number), (some, np.ones(len(some)), np.full(len(some), float(number.sum())))]
        if rank_layers is not None:
            of_class = costs.classes.run_class
            bulk = of_class == of_class[costs.bulk_run]
            held = costs.slots.held
            ranks = np.zeros((costs.order.num_ranks, self.num_columns))
            ranks[:, layers] = held[:, stage_of] * bulk[run_of]
            blocks.append((ranks, rank_layers[0].astype(np.float64), rank_layers[1].astype(np.float64)))
            assert self._floors is not None
            rank, slope, least = self._floors.rank, self._floors.slope, self._floors.constant
            if len(rank) and (self._num_floors or self._raise):
                floors = -slope[:, None] * self._scale * ranks[rank]
                if self._num_floors:
                    floors[np.arange(len(rank)), 1 + count + rank] = 1.0
                for position, level in enumerate(self._raise):
                    extra_s = costs.runs.recompute_s[level] - costs.runs.recompute_s[self._base]
                    first = 1 + count * (1 + position)
                    floors[:, first : first + count] = held[rank][:, stage_of] * (bulk * extra_s * self._scale)[run_of]
                blocks.append((floors, least * self._scale, np.full(len(rank), np.inf)))
        if self._raise:
            most = np.zeros((count, self.num_columns))
            most[np.arange(count), 1 + np.arange(count)] = -1.0
            for position in range(len(self._raise)):
                most[np.arange(count), 1 + count * (1 + position) + np.arange(count)] = 1.0
            blocks.append((most, np.full(count, -np.inf), np.zeros(count)))
        self._solver.add(*(np.concatenate(part) for part in zip(*blocks, strict=True)))
        if self._form == "whole":
            self._run_order_rows()
        if self._form != "light":
            self._memory_rows(rank_layers)

    def _add_at_most(self, index: list[int], value: list[float], most: float) -> None:
        """Add a row that is at most a number; columns that are named twice count twice."""
        row = np.zeros((1, self.num_columns))
        np.add.at(row[0], index, value)
        self._solver.add(row, np.array([-np.inf]), np.array([most]))

    def _run_order_rows(self) -> None:
        """Keep runs in the model's order: a share of run k + 1 at most up to a stage as of run k.

        Layers are contiguous, so either nothing of run k + 1 stands up to the stage or all of run k does. Only stages say
        anything that run k + 1 reaches and behind which run k can stand.
        """
        length, reach = self._costs.runs.length.astype(np.float64), reachable(self._costs)
        for run in range(self._shape[1] - 1):
            first, last = int(np.argmax(reach[:, run + 1])), int(np.flatnonzero(reach[:, run])[-1])
            for end in range(first + 1, last + 1):
                places = [(stage, which) for which in (run, run + 1) for stage in np.flatnonzero(reach[:end, which])]
                index = [self._index(int(stage), which) for stage, which in places]
                value = [(-1.0 if which == run else 1.0) / float(length[which]) for _, which in places]
                self._add_at_most(index, value, 0.0)

    @cached_property
    def wholes(self) -> Wholes:
        """What is whole in every completion; the sums of raised layers over ranks become rows at the first call."""
        assert self._form == "whole" and not self.cuts
        costs, of_class = self._costs, self._costs.classes.run_class
        runs = costs.runs.num_runs
        count, ranks, first_row = len(self._cells), costs.order.num_ranks, self.num_columns
        alike = of_class == of_class[costs.bulk_run]
        found: list[tuple[int, int]] = []
        bulk = np.where(np.isin(self._cells // runs, self._shared), CELLS, STAGES)
        layers = np.where(alike[self._cells % runs], bulk, ENDS).tolist()
        found += [(kind, 1 + place) for place, kind in enumerate(layers)]
        found += [(RAISED, 1 + place) for place in range(count, count * (1 + len(self._raise)))]
        switches = range(self._first_switch, self._first_switch + ranks * len(self._raise))
        found += [(SWITCHES, column) for column in switches]
        found += [(STAGES, first_row + runs + place) for place in range(len(self._shared))]
        if self._has_rank_rows:
            found += [(RANKS, first_row + runs + len(self._shared) + rank) for rank in range(ranks)]
        for slots in costs.order.slots:
            for position in range(len(self._raise)):
                cells = [
                    self._raised(position, slot.stage, run)
                    for slot in slots
                    for run in np.flatnonzero(alike).tolist()
                    if self._index(slot.stage, run)
                ]
                row = np.zeros((1, self.num_columns))
                np.add.at(row[0], cells, 1.0)
                found.append((RAISED_ON_RANKS, first_row + self._solver.num_rows))
                self._solver.add(row, np.zeros(1), row @ np.full(self.num_columns, float(costs.num_layers)))
        self._first_cut = self._solver.num_rows
        kind, variable = (np.array(column) for column in zip(*found, strict=True))
        return Wholes(kind, variable, *self._solver.limits(variable))

    def _memory_rows(self, rank_layers: tuple[Longs, Longs] | None) -> None:
        """Add a row for each live vector of each rank."""
        costs = self._costs
        scale = 1.0 / max(costs.capacity_bytes, 1.0)
        for rank in range(costs.order.num_ranks):
            most = costs.num_layers if rank_layers is None else int(rank_layers[1][rank])
            least = self._least_workspace(rank)
            room = (costs.capacity_bytes - least) * scale
            live = costs.order.live[rank]
            if self._form == "whole":
                rows = self._bytes_rows(rank, live, np.zeros(3))
                switches, rises = self._workspace_switches(rank, least, most)
                rows[:, switches] += rises
            else:
                rows = self._bytes_rows(rank, live, self._workspace_steps(rank, least, most))
            self._solver.add(rows * scale, np.full(len(rows), -np.inf), np.full(len(rows), room))

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
            self._add_at_most([*index, column], [1.0] * len(index) + [-float(max(most, 1))], 0.0)
            switches.append(column)
            rises.append(rise)
            before += rise
        return switches, rises

    def _bytes_rows(self, rank: int, live: Floats, steps: Floats) -> Floats:
        """Return the bytes of a rank at some live vectors [n, 2, V] as rows over the columns, [n, columns]."""
        runs, of_class, count = self._costs.runs, self._costs.classes.run_class, len(self._cells)
        alike = of_class == of_class[self._costs.bulk_run]
        rows = np.zeros((len(live), self.num_columns))
        for place, slot in enumerate(self._costs.order.slots[rank]):
            first = slot.stage * runs.num_runs
            position = self._position[first : first + runs.num_runs]
            here = position >= 0
            column = 1 + position[here]
            each = live[:, 0, place, None, None] * runs.kept_bytes + live[:, 1, place, None, None] * runs.late_bytes
            rows[:, column] += runs.state_bytes[here] + each[:, self._base, here]
            for block, level in enumerate(self._raise):
                saved = each[:, level] - each[:, self._base] + steps[level] * alike
                rows[:, column + count * (1 + block)] += saved[:, here]
        return rows

    def add(self, cuts: Sequence[Cut]) -> None:
        """Add critical paths of the order."""
        if cuts:
            rows, constants = self.rows(cuts)
            self._solver.add(rows, constants, np.full(len(cuts), np.inf))
            self.cuts += cuts

    def rows(self, cuts: Sequence[Cut]) -> tuple[Floats, Floats]:
        """Return coefficients [n, columns] and constants [n], scaled, with row . columns >= constant: theta minus a path."""
        costs, runs = self._costs, self._costs.runs
        counts = np.array([cut.counts for cut in cuts], dtype=np.float64)
        forward, input_grad, weight_grad = counts[:, 0], counts[:, 1], counts[:, 2]
        ends = np.array([cut.end_rank for cut in cuts], dtype=np.int64)
        held = costs.slots.held[ends]
        back_s = runs.input_grad_s + runs.recompute_s[self._base]
        each = forward[:, :, None] * runs.forward_s + input_grad[:, :, None] * back_s
        each += weight_grad[:, :, None] * runs.weight_grad_s
        tail_s = runs.step_s + costs.replica_s if len(costs.replica_s) else runs.step_s
        each += held[:, :, None] * tail_s
        constants = np.array([cut.hops for cut in cuts]) @ costs.least_hop_s + costs.step_overhead_s
        overheads = forward.sum(axis=1) + input_grad.sum(axis=1)
        if costs.order.split:
            overheads = overheads + weight_grad.sum(axis=1)
        constants = constants + costs.overhead_s * overheads + costs.constant_tail_s[ends]
        constants = constants + costs.stage_latency_s * held.sum(axis=1)
        if len(costs.replica_latency_s):
            constants = constants + held @ costs.replica_latency_s
        rows = np.zeros((len(cuts), self.num_columns))
        rows[:, 0] = 1.0
        count, runs_of = len(self._cells), self._shape[1]
        rows[:, 1 : 1 + count] = -each.reshape(len(cuts), -1)[:, self._cells] * self._scale
        for position, level in enumerate(self._raise):
            extra_s = (runs.recompute_s[level] - runs.recompute_s[self._base])[self._cells % runs_of]
            first = 1 + count * (1 + position)
            rows[:, first : first + count] = -input_grad[:, self._cells // runs_of] * extra_s * self._scale
        if self._num_floors:
            rows[:, 1 + count : 1 + count + self._num_floors] = -least_visits(costs, input_grad)
        return rows, constants * self._scale

    def limit(self, variable: int, low: float, high: float) -> None:
        """Set the limits of a variable of `wholes`."""
        self._solver.limit(variable, low, high)

    def stop_at(self, target_s: float) -> None:
        """Stop solving where the optimum is proved to be at least `target_s`."""
        self._limit = min(target_s * self._scale, _LONGEST)

    def solve(self) -> Point | None:
        """Return the optimum; None when there is none, or where it is proved to be at least the target."""
        bound = self._solver.solve(self._limit)
        if bound >= self._limit:
            return None
        self.values = self._solver.columns()
        return self._point(self.values, bound / self._scale)

    def values_of(self, wholes: Wholes) -> Floats:
        """Return the values of what is whole at the last solution, [n]."""
        is_row = wholes.variable >= self.num_columns
        values = self.values[np.where(is_row, 0, wholes.variable)]
        values[is_row] = self._solver.activities(wholes.variable[is_row] - self.num_columns, self.values)
        return values

    def probe(self, variable: int, limits: Sequence[tuple[float, float]], steps: int) -> list[float]:
        """Return a bound under each of some limits of a variable, after so many dual steps from the last optimum.

        Infinite where the optimum is proved to be at least the target.
        """
        return [self._solver.probe(variable, *pair, self._limit, steps) / self._scale for pair in limits]

    def misses(self, cut: Cut) -> bool:
        """Tell whether the last optimum is below a path."""
        rows, constants = self.rows([cut])
        return bool(constants[0] - rows[0] @ self.values > 1e-6 * self.values[0])

    def carrying(self) -> list[Cut]:
        """Return which of `cuts` bind in the last basis."""
        binding = self._solver.binding()[self._first_cut :]
        return [self.cuts[place] for place in np.flatnonzero(binding).tolist()]

    def _point(self, values: Floats, bound_s: float) -> Point:
        layers = self._spread(values, 0)
        return Point(bound_s, layers, self._spread_raised(values), self._spread_floors(values, layers))

    def _spread_floors(self, values: Floats, layers: Floats) -> float | Floats:
        """Return each rank's recomputation spread over its stages by their layers, [S]."""
        if not self._num_floors:
            return 0.0
        first = 1 + len(self._cells)
        held, on_stage = self._costs.slots.held, layers.sum(axis=1)
        share = values[first : first + self._num_floors] / self._scale / np.maximum(held @ on_stage, 1e-9)
        return np.asarray(on_stage * (held * share[:, None]).max(axis=0))

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

    def multipliers(self) -> Floats:
        """Return the multipliers of `cuts`, at least zero."""
        return np.asarray(np.maximum(self._solver.multipliers()[self._first_cut :], 0.0))


def least_visits(costs: CandidateCosts, input_grad: Floats) -> Floats:
    """Return how often paths of these input gradients [n, S] pay a rank's recomputation at least, [n, D]."""
    place = costs.slots.stage
    visits = np.where(place >= 0, input_grad[:, np.maximum(place, 0)], np.inf).min(axis=2)
    return np.asarray(visits / costs.order.num_replicas)


class _FloorLines(NamedTuple):
    """Lines of the ranks' hulls: rank, slope and constant [n], seconds; and the most that any hull asks for, [D]."""

    rank: Longs
    slope: Floats
    constant: Floats
    most: Floats


def _floor_lines(costs: CandidateCosts, rank_layers: tuple[Longs, Longs]) -> _FloorLines:
    """Return the lines of each rank's hull of recomputation above the weakest level's.

    Lines that are nowhere positive are left out, and so are ranks of more than MOST_LISTED layers.
    """
    low, high = rank_layers
    base = int(np.argmax(costs.levels))
    ranks: list[int] = []
    lines: list[tuple[float, float]] = []
    most = np.zeros(len(low))
    if int(costs.levels.sum()) > 1 and int(high.max(initial=0)) <= MOST_LISTED:
        floors = recompute_floors(costs.rank_tables, low, high)
        each = float(costs.runs.recompute_s[base, costs.bulk_run])
        for rank in range(len(low)):
            numbers = low[rank] + np.flatnonzero(np.isfinite(floors[rank]))
            values = floors[rank][numbers - low[rank]] - each * numbers
            most[rank] = values.max(initial=0.0)
            for line in _lower_hull(numbers.tolist(), values.tolist()):
                ranks.append(rank)
                lines.append(line)
    columns = np.array(lines).reshape(-1, 2)
    return _FloorLines(np.array(ranks, dtype=np.int64), columns[:, 0], columns[:, 1], most)


def _lower_hull(numbers: list[int], values: list[float]) -> list[tuple[float, float]]:
    """Return (slope, constant) of the lower hull's lines; one level line where there is one number; no line at zero."""
    hull: list[int] = []
    for place in range(len(numbers)):
        while len(hull) > 1:
            first, second = hull[-2], hull[-1]
            rise = (values[second] - values[first]) * (numbers[place] - numbers[first])
            if rise < (values[place] - values[first]) * (numbers[second] - numbers[first]):
                break
            hull.pop()
        hull.append(place)
    if len(hull) == 1:
        return [(0.0, values[hull[0]])] if values[hull[0]] > 0.0 else []
    lines = []
    for first, second in pairwise(hull):
        if max(values[first], values[second]) > 0.0:
            slope = (values[second] - values[first]) / (numbers[second] - numbers[first])
            lines.append((slope, values[first] - slope * numbers[first]))
    return lines


def reachable(costs: CandidateCosts) -> npt.NDArray[np.bool_]:
    """Return which runs can stand on which stages when every stage holds at least one layer, [S, K]."""
    start = costs.classes.run_start.astype(np.int64)
    stage = np.arange(costs.num_stages)[:, None]
    layers, stages = costs.num_layers, costs.num_stages
    return np.asarray((stage <= start[None, 1:] - 1) & (stage >= stages - layers + start[None, :-1]))
