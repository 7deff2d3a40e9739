"""A candidate's linear program over cuts: stages as layer counts, critical paths as rows.

    min  theta
    s.t. theta >= path_j(F(n, e), I(n, e), W(n), hops, tails(n))      for every cut j of the order
         sum_s n[s, k] = N_k                                          for every run k of equal layers
         lo_r <= sum of n of the largest class over the stages of rank r <= hi_r           caps at the target
         1 <= sum_k n[s, k];  n[s, k] = 0 where run k cannot reach stage s      a column's limit where one run reaches it
         sum_l e[s, k, l] <= n[s, k]                                  layers raised above the weakest level
         states + live vectors . bytes + workspace <= capacity        for every rank and each of its vectors

         rho_r >= lower convex hull of the least recomputation of lo_r, .., hi_r whole layers on rank r

Ranks that nothing within their limits could overfill have no memory rows, and where a stage stands on no other rank, no e.
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
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.caps import recompute_floors
from stagewright.planner.search.dual_simplex import ABOVE
from stagewright.planner.search.linear_program import Basis, LinearProgram
from stagewright.planner.search.memory_rows import add_bytes
from stagewright.planner.search.order import Cut, pad
from stagewright.planner.search.path_pool import PathPool
from stagewright.planner.search.path_rows import Columns, Rules, Steps, add_rows, improve_bound, trace_point

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

MOST_LISTED = 80  # layers of a rank up to which every number is tried
_FAR = 16.0  # times the target, where theta ends
_LONGEST = 1e7  # passes of a microbatch: no step takes as long

Form = Literal["light", "whole"]
_ROOM: dict[Form, int] = {"light": 384, "whole": 1280}  # rows there is room for at first
_Block = tuple[Floats, Floats, Floats]  # rows [m, n], the least and the most of each

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
    """A solution: bound in seconds, layers [S, K], raised layers [S, K, 3] (level 0 unused), and floors [D], scaled; empty
    where the form has none."""

    bound_s: float
    layers: Floats
    raised: Floats
    floors: Floats

    @property
    def counts(self) -> Floats:
        """Layers by level, [S, K, 3], for the simulator."""
        counts = self.raised.copy()
        counts[:, :, 0] = self.layers - self.raised.sum(axis=2)
        return counts


class NamedBasis(NamedTuple):
    """A basis of a program: rows that are no paths, and the names of the paths that bind; and what programs alike share."""

    likeness: tuple[object, ...]
    fixed: Basis
    paths: Longs


class CutProgram:
    """The program of one candidate below a target, over the paths of its order and more that it finds."""

    def __init__(
        self,
        costs: CandidateCosts,
        pool: PathPool,
        *,
        form: Form,
        target_s: float,
        rank_layers: tuple[Longs, Longs] | None = None,
    ) -> None:
        self._costs = costs
        self._pool = pool
        self.form = form
        self._most = np.full(costs.order.num_ranks, costs.num_layers) if rank_layers is None else rank_layers[1]
        self._scale = 1.0 / max(float(costs.runs.time_s @ costs.runs.length), 1e-12)
        self._base = int(np.argmax(costs.levels))
        self._raise = [level for level in range(self._base + 1, 3) if costs.levels[level]] if form != "light" else []
        self._floors = None if rank_layers is None else _floor_lines(costs, rank_layers)
        self.stop_at(target_s)
        self._columns()
        self._rows(rank_layers)
        if form == "whole":
            self.wholes = self._wholes()
        self._first_path = self._solver.num_rows
        self._map = self._path_columns()
        self._values = np.zeros(self.num_columns)
        self._names = np.zeros(0, dtype=np.int64)
        self._next_name = 0
        self._know()
        self.inner, self.inner_s = np.zeros(self.num_columns), np.inf
        self.simulated = 0

    @property
    def effort(self) -> float:
        """Entries of tables that the solver went through, at most: its work, whatever the machine."""
        return float(self._solver.num_pivots) * self.num_columns**2

    @property
    def _shape(self) -> tuple[int, int]:
        return self._costs.num_stages, self._costs.runs.num_runs

    def _columns(self) -> None:
        """Add theta, then the layers of each run on the stages it reaches, then the raised ones by level."""
        costs = self._costs
        _, runs = self._shape
        reach = costs.reach
        is_shared = reach.sum(axis=1) > 1
        self._shared = np.flatnonzero(is_shared)  # stages that several runs reach
        self._cells = np.flatnonzero(reach.ravel())
        self._stage_of, self._run_of = self._cells // runs, self._cells % runs
        self._overfull = self._may_overfill() if self._raise else np.zeros(costs.order.num_ranks, dtype=np.bool_)
        self._raised_cells = np.flatnonzero(costs.slots.held[self._overfull].sum(axis=0)[self._stage_of] > 0.0)
        self._raised_position = np.full(len(self._cells), -1, dtype=np.int64)
        self._raised_position[self._raised_cells] = np.arange(len(self._raised_cells))
        cells, raised = len(self._cells), len(self._raised_cells) * len(self._raise)
        switches = int(self._overfull.sum()) * len(self._raise) if self.form == "whole" else 0
        floors = 0 if self.form != "light" or self._floors is None else costs.order.num_ranks
        self._first_switch = 1 + cells + raised
        self._first_floor = self._first_switch + switches if floors else -1
        count = self._first_switch + switches + floors
        upper = np.ones(count)
        upper[0] = _FAR * self._limit
        most = costs.runs.length.astype(np.float64)[self._run_of]
        upper[1 : 1 + cells] = most
        upper[1 + cells : 1 + cells + raised] = np.tile(most[self._raised_cells], len(self._raise))
        if floors:
            assert self._floors is not None
            upper[self._first_floor :] = self._floors.most * self._scale
        lower = np.zeros(count)
        lower[1 : 1 + cells] = ~is_shared[self._stage_of]
        cost = np.zeros(count)
        cost[0] = 1.0
        self._solver = LinearProgram(lower, upper, cost, room=_ROOM[self.form])
        self.num_columns = count

    def _may_overfill(self) -> npt.NDArray[np.bool_]:
        """Tell which ranks some layers could overfill without recomputation, [D]; none of the others gains by raising any."""
        costs, runs, slots = self._costs, self._costs.runs, self._costs.slots
        if (runs.recompute_s[self._raise] < runs.recompute_s[self._base]).any():
            return np.ones(costs.order.num_ranks, dtype=np.bool_)
        alike = costs.classes.run_class == costs.classes.run_class[costs.bulk_run]
        kept, late = runs.kept_bytes[self._base], runs.late_bytes[self._base]
        active = slots.live[:, :, 0, :, None] * kept + slots.live[:, :, 1, :, None] * late
        reach = costs.reach[np.maximum(slots.stage, 0)] & (slots.stage >= 0)[:, :, None]
        each = np.where(reach[:, None], active + runs.state_bytes, 0.0)  # [D, N, V, K]
        bulk = each[..., alike].max(axis=(2, 3)) * self._most[:, None]
        small = (each[..., ~alike].max(axis=2) * runs.length[~alike]).sum(axis=2) * costs.order.num_replicas
        workspace = np.where(reach.any(axis=1), runs.workspace_bytes[self._base], 0.0).max(axis=1)
        return np.asarray((bulk + small).max(axis=1) + workspace > costs.capacity_bytes)

    def _raised(self, position: int, cells: Longs) -> Longs:
        """Return the columns of raised layers of some cells that have them."""
        return 1 + len(self._cells) + position * len(self._raised_cells) + self._raised_position[cells]

    def _rows(self, rank_layers: tuple[Longs, Longs] | None) -> None:
        """Add the rows that are no paths, all at once."""
        costs, count = self._costs, len(self._cells)
        runs = self._shape[1]
        layers = slice(1, 1 + count)
        self._has_rank_rows = rank_layers is not None
        whole = np.zeros((runs, self.num_columns))
        whole[self._run_of, 1 + np.arange(count)] = 1.0
        number = costs.runs.length.astype(np.float64)
        some = np.zeros((len(self._shared), self.num_columns))
        some[:, layers] = self._shared[:, None] == self._stage_of
        blocks = [(whole, number, number), (some, np.ones(len(some)), np.full(len(some), float(number.sum())))]
        if rank_layers is not None:
            ranks = np.zeros((costs.order.num_ranks, self.num_columns))
            ranks[:, layers] = costs.slots.held[:, self._stage_of] * self._is_bulk
            blocks.append((ranks, rank_layers[0].astype(np.float64), rank_layers[1].astype(np.float64)))
            self._tighten(ranks, rank_layers[1].astype(np.float64))
            blocks += self._floor_rows(ranks)
        if self._raise:
            marked = np.arange(len(self._raised_cells))
            most = np.zeros((len(marked), self.num_columns))
            most[marked, 1 + self._raised_cells] = -1.0
            for position in range(len(self._raise)):
                most[marked, self._raised(position, self._raised_cells)] = 1.0
            blocks.append((most, np.full(len(most), -np.inf), np.zeros(len(most))))
        if self.form == "whole":
            blocks += self._run_order_rows()
        if self._overfull.any():
            blocks += self._memory_rows()
        self._solver.add(*(np.concatenate(part) for part in zip(*blocks, strict=True)))

    def _tighten(self, ranks: Floats, most: Floats) -> None:
        """Lower the columns' limits to what rows of ranks [D, n] leave at their most: the solver goes from limit to limit."""
        count = len(self._cells)
        low, high = self._solver.table.low, self._solver.table.high
        cells = slice(1, 1 + count)
        least = ranks @ low[: self.num_columns]
        with np.errstate(divide="ignore", invalid="ignore"):
            own = np.where(ranks > 0.0, (most[:, None] - least[:, None]) / ranks + low[: self.num_columns], np.inf)
        left = np.minimum(high[cells], own.min(axis=0)[cells].clip(low[cells]))
        high[cells] = left
        for position in range(len(self._raise)):
            high[self._raised(position, self._raised_cells)] = left[self._raised_cells]

    def _floor_rows(self, ranks: Floats) -> list[_Block]:
        """Return rows, least and most of the floors of recomputation, for rows [D, n] of the ranks' layers."""
        assert self._floors is not None
        rank, costs = self._floors.rank, self._costs
        if not len(rank) or not (self._first_floor >= 0 or self._raise):
            return []
        floors = -self._floors.slope[:, None] * self._scale * ranks[rank]
        if self._first_floor >= 0:
            floors[np.arange(len(rank)), self._first_floor + rank] = 1.0
        on_rank = ranks[rank][:, 1 + self._raised_cells]
        for position, level in enumerate(self._raise):
            extra_s = (costs.runs.recompute_s[level] - costs.runs.recompute_s[self._base])[self._run_of]
            columns = self._raised(position, self._raised_cells)
            floors[:, columns] = on_rank * extra_s[self._raised_cells] * self._scale
        return [(floors, self._floors.constant * self._scale, np.full(len(rank), np.inf))]

    def _run_order_rows(self) -> list[_Block]:
        """Return rows that keep runs in the model's order: a share of run k + 1 at most up to a stage as of run k.

        Layers are contiguous, so either nothing of run k + 1 stands up to the stage or all of run k does. Only stages say
        anything that run k + 1 reaches and behind which run k can stand.
        """
        length, reach = self._costs.runs.length.astype(np.float64), self._costs.reach
        blocks = []
        for run in range(self._shape[1] - 1):
            first, last = int(np.argmax(reach[:, run + 1])), int(np.flatnonzero(reach[:, run])[-1])
            share = np.where(self._run_of == run, -1.0 / length[run], 0.0)
            share += np.where(self._run_of == run + 1, 1.0 / length[run + 1], 0.0)
            ends = np.arange(first + 1, last + 1)
            rows = np.zeros((len(ends), self.num_columns))
            rows[:, 1 : 1 + len(self._cells)] = share * (self._stage_of < ends[:, None])
            blocks.append((rows, np.full(len(ends), -np.inf), np.zeros(len(ends))))
        return blocks

    def _wholes(self) -> Wholes:
        """Return what is whole in every completion; the sums of raised layers over ranks become rows."""
        costs = self._costs
        runs, ranks = costs.runs.num_runs, costs.order.num_ranks
        count, first_row = len(self._cells), self.num_columns
        bulk = np.where(np.isin(self._stage_of, self._shared), CELLS, STAGES)
        raised, switches = self._first_switch - 1 - count, self.num_columns - self._first_switch
        of_columns = np.concatenate(
            (np.where(self._is_bulk, bulk, ENDS), np.full(raised, RAISED), np.full(switches, SWITCHES))
        )
        of_rows = np.repeat((STAGES, RANKS), (len(self._shared), ranks * self._has_rank_rows))
        kinds = [of_columns, of_rows]  # of the columns behind theta, and of rows behind those of the runs
        variables = [1 + np.arange(len(of_columns)), first_row + runs + np.arange(len(of_rows))]
        overfull = np.flatnonzero(self._overfull)
        if len(overfull) and self._raise:
            kinds.append(np.full(len(overfull) * len(self._raise), RAISED_ON_RANKS))
            variables.append(first_row + self._solver.num_rows + np.arange(len(kinds[-1])))
            sums = np.zeros((len(overfull), len(self._raise), self.num_columns))
            bulk_cells = self._raised_cells[self._is_bulk[self._raised_cells]]
            held = costs.slots.held[overfull][:, self._stage_of[bulk_cells]]
            for position in range(len(self._raise)):
                sums[:, position, self._raised(position, bulk_cells)] = held
            rows = sums.reshape(-1, self.num_columns)
            self._solver.add(rows, np.zeros(len(rows)), rows.sum(axis=1) * costs.num_layers)
        kind, variable = np.concatenate(kinds), np.concatenate(variables)
        return Wholes(kind, variable, *self._solver.limits(variable))

    @property
    def _is_bulk(self) -> npt.NDArray[np.bool_]:
        """Which cells are of the largest class, [C]."""
        of_class = self._costs.classes.run_class
        return np.asarray((of_class == of_class[self._costs.bulk_run])[self._run_of])

    def _memory_rows(self) -> list[_Block]:
        """Return a row for each live vector of the ranks that may be overfull, and what ties their switches."""
        costs, runs, order = self._costs, self._costs.runs, self._costs.order
        ranks = np.flatnonzero(self._overfull)
        number = np.array([len(live) for live in order.live])
        cells = np.arange(len(self._cells))
        raised = np.stack([self._raised(position, cells) for position in range(len(self._raise))])
        rows = np.zeros((int(number[ranks].sum()), self.num_columns))
        first_cell = np.searchsorted(self._stage_of, np.arange(self._shape[0] + 1))
        add_bytes(
            costs.slots.stage, costs.slots.live, ranks, number, first_cell, self._run_of, raised, runs.kept_bytes,
            runs.late_bytes, runs.state_bytes, self._base, np.array(self._raise, dtype=np.int64), rows,
        )  # fmt: skip
        least = self._least_workspace()[ranks]
        rises, ties = self._workspace_switches(ranks, least, raised)
        of_rank = np.repeat(np.arange(len(ranks)), number[ranks])
        rows[:, self._first_switch : self._first_switch + rises.size] += _on_own_columns(rises)[of_rank]
        scale = 1.0 / max(costs.capacity_bytes, 1.0)
        room = (costs.capacity_bytes - least[of_rank]) * scale
        return [
            (rows * scale, np.full(len(rows), -np.inf), room),
            (ties, np.full(len(ties), -np.inf), np.zeros(len(ties))),
        ]

    def _workspace_switches(self, ranks: Longs, least: Floats, raised: Longs) -> tuple[Floats, Floats]:
        """Return the bytes that the binary of each level adds on some ranks, [n, levels], and rows that tie those that add any.

        `raised` [levels, C] are the columns of raised layers.
        """
        workspace = self._rising_workspace()[self._raise]
        before = np.maximum(least[:, None], np.append(0.0, workspace[:-1]))
        rises = np.maximum(workspace - before, 0.0)
        place, position = np.nonzero(rises)
        bulk = self._raised_cells[self._is_bulk[self._raised_cells]]
        on_rank = self._costs.slots.held[ranks[place]][:, self._stage_of[bulk]] > 0.0
        ties = np.zeros((len(place), self.num_columns))
        for level in range(len(self._raise)):
            ties[:, raised[level, bulk]] = on_rank & (position <= level)[:, None]
        switch = self._first_switch + place * len(self._raise) + position
        ties[np.arange(len(place)), switch] = -np.maximum(self._most[ranks[place]], 1.0)
        return rises, ties

    def _least_workspace(self) -> Floats:
        """Return what the workspace of each rank is at least, [D]: on every stage stands some layer that reaches it."""
        costs = self._costs
        workspace = costs.runs.workspace_bytes[costs.levels].min(axis=0)
        sure = np.where(costs.reach, workspace, np.inf).min(axis=1)
        sure[0], sure[-1] = max(sure[0], workspace[0]), max(sure[-1], workspace[-1])
        return np.asarray(costs.slots.on_ranks(sure).max(axis=1))

    def _rising_workspace(self) -> Floats:
        """Return what a layer of the largest class at each level or a stronger one needs at least, [3]."""
        workspace = self._costs.runs.workspace_bytes[:, self._costs.bulk_run].copy()
        workspace[~self._costs.levels] = np.inf
        return np.asarray(np.minimum.accumulate(workspace[::-1])[::-1])

    def _path_columns(self) -> Columns:
        costs, runs, order, scale = self._costs, self._costs.runs, self._costs.order, self._scale
        replicated = len(costs.replica_s) > 0
        held = costs.slots.held
        back_s = runs.input_grad_s + runs.recompute_s[self._base]
        step_s = runs.step_s + costs.replica_s if replicated else runs.step_s
        end_s = costs.constant_tail_s + costs.stage_latency_s * held.sum(axis=1)
        if replicated:
            end_s = end_s + held @ costs.replica_latency_s
        return Columns(
            stage_of=self._stage_of,
            run_of=self._run_of,
            raised=self._raised_cells,
            each=np.stack((runs.forward_s, back_s, runs.weight_grad_s, step_s)) * scale,
            extra=(runs.recompute_s[self._raise] - runs.recompute_s[self._base]) * scale,
            held=held,
            slot_stage=costs.slots.stage,
            end_s=end_s * scale,
            hop_s=pad(costs.least_hop_s) * scale,
            overhead_s=costs.overhead_s * scale,
            step_s=costs.step_overhead_s * scale,
            split=order.split,
            replicas=order.num_replicas,
            first_floor=self._first_floor,
        )

    @cached_property
    def _steps(self) -> Steps:
        order = self._costs.order
        return Steps(order.before, order.across, order.hop, order.code, order.last)

    def _know(self, more: int = 0) -> None:
        """Take the pool's further paths as rows, and make room for more."""
        pool = self._pool
        pool.reserve(more)
        names = pool.names[: pool.number]
        new = np.flatnonzero(names >= self._next_name)
        self._next_name = pool.next_name
        table = self._solver.with_room(len(new) + more)
        add_rows(table, self._map, pool.counts, pool.ends, new)
        self._names = np.concatenate((self._names, names[new]))

    def basis(self) -> NamedBasis:
        """Return the last basis, with paths by their names."""
        found = self._solver.basis()
        first = self._first_path
        is_path = found.rows >= first
        names = self._names[found.rows[is_path] - first]
        fixed = found._replace(rows=found.rows[~is_path], at_low=found.at_low[~is_path])
        return NamedBasis(self._likeness, fixed, names)

    def start_from(self, basis: NamedBasis | None) -> None:
        """Start from the basis of another candidate's program where the two are alike."""
        if basis is None or basis.likeness != self._likeness:
            return
        fixed, places = basis.fixed, np.flatnonzero(np.isin(self._names, basis.paths))
        self._solver.start_at(
            fixed._replace(
                rows=np.concatenate((fixed.rows, self._first_path + places)),
                at_low=np.concatenate((fixed.at_low, np.ones(len(places), dtype=np.bool_))),
            )
        )

    @property
    def _likeness(self) -> tuple[object, ...]:
        return self.form, self.num_columns, self._first_path, self._cells.tobytes(), self._raised_cells.tobytes()

    @property
    def variables(self) -> bytes:
        """What the places of `wholes` stand for: limits on them mean the same in a program of the candidate that has the same."""
        return b"/".join(each.tobytes() for each in (self.wholes.kind, self._cells, self._raised_cells, self._overfull))

    def add(self, cut: Cut) -> None:
        """Add a path of the order."""
        self._pool.add(cut)
        self._know()

    def start_at(self, inner: Point | None) -> None:
        """Draw points towards one of another program of the order, or towards layers spread evenly."""
        values = self._even() if inner is None else self._columns_at(inner)
        self.inner = values if self._is_within(values) else self._even()
        pool = self._pool
        self._know(1)
        value = trace_point(self._map, self._steps, pool.counts, pool.ends, pool.number, self.inner)
        self.simulated += 1
        pool.grow_to(pool.number + 1)
        self._know()
        self.inner_s = value / self._scale

    def _even(self) -> Floats:
        """Return the point with every run spread evenly over the stages it can stand on."""
        values = np.zeros(self.num_columns)
        number = np.bincount(self._run_of, minlength=self._shape[1])
        values[1 : 1 + len(self._cells)] = (self._costs.runs.length / np.maximum(number, 1))[self._run_of]
        return values

    def _is_within(self, values: Floats) -> bool:
        """Tell whether a point of another candidate of the order obeys the limits on layers of ranks."""
        if not self._has_rank_rows:
            return True
        first = self._shape[1] + len(self._shared)
        rows = np.arange(first, first + self._costs.order.num_ranks)
        low, high = self._solver.limits(self.num_columns + rows)
        on_rank = self._solver.activities(rows, values)
        return bool(((on_rank >= low - 1e-6) & (on_rank <= high + 1e-6)).all())

    def improve(self, rules: Rules) -> float:
        """Return the bound that rounds of solving and tracing prove, infinite where it is at least the target.

        Minus infinity where the solver gives up. What is found goes to the pool.
        """
        self._know(2 * rules.rounds + 2)
        pool = self._pool
        known = pool.number
        status, bound, value, number, traced = improve_bound(
            self._solver.table,
            self._map,
            self._steps,
            pool.counts,
            pool.ends,
            pool.number,
            self.inner,
            self.inner_s * self._scale,
            self._limit,
            rules,
        )
        pool.grow_to(number)
        self._names = np.concatenate((self._names, pool.names[known:number]))
        self._next_name = pool.next_name
        self.inner_s = value / self._scale
        self.simulated += traced
        if status == ABOVE:
            return np.inf
        self._values = self._solver.columns()
        return float(bound / self._scale)

    def point(self, bound_s: float) -> Point:
        """Return the last solution with a bound."""
        return self._point(self._values, bound_s)

    def inner_point(self) -> Point:
        """Return the best point, without a bound."""
        return self._point(self.inner, -np.inf)

    def limit(self, variables: Longs, low: Floats, high: Floats) -> None:
        """Set the limits of some variables of `wholes`, [n] each."""
        self._solver.limit(variables, low, high)

    def stop_at(self, target_s: float) -> None:
        """Stop solving where the optimum is proved to be at least `target_s`."""
        self._limit = min(target_s * self._scale, _LONGEST)

    def values_of(self, wholes: Wholes) -> Floats:
        """Return the values of what is whole at the last solution, [n]."""
        is_row = wholes.variable >= self.num_columns
        values: Floats = self._values[np.where(is_row, 0, wholes.variable)]
        values[is_row] = self._solver.activities(wholes.variable[is_row] - self.num_columns, self._values)
        return values

    def probe(self, variable: int, limits: Sequence[tuple[float, float]], steps: int) -> list[float]:
        """Return a bound under each of some limits of a variable, after so many dual steps from the last optimum.

        Infinite where the optimum is proved to be at least the target.
        """
        return [self._solver.probe(variable, *pair, self._limit, steps) / self._scale for pair in limits]

    def misses(self, cut: Cut) -> bool:
        """Add a path; tell whether the last optimum is below it."""
        self.add(cut)
        last = np.array([self._solver.num_rows - 1])
        low, _ = self._solver.limits(self.num_columns + last)
        return bool(low[0] - self._solver.activities(last, self._values)[0] > 1e-6 * self._values[0])

    def carrying(self) -> Longs:
        """Return the names of the paths that bind in the last basis."""
        return self._names[self._solver.binding()[self._first_path :]]

    def _point(self, values: Floats, bound_s: float) -> Point:
        stages, runs = self._shape
        layers, raised = np.zeros((stages, runs)), np.zeros((stages, runs, 3))
        # Where the solver gave up, values may be anything.
        values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
        most = self._costs.runs.length.astype(np.float64)[self._run_of]
        layers[self._stage_of, self._run_of] = values[1 : 1 + len(self._cells)].clip(0.0, most)
        stage, run = self._stage_of[self._raised_cells], self._run_of[self._raised_cells]
        for position, level in enumerate(self._raise):
            column = values[self._raised(position, self._raised_cells)]
            raised[stage, run, level] = column.clip(0.0, most[self._raised_cells])
        floors = values[self._first_floor :].copy() if self._first_floor >= 0 else np.zeros(0)
        return Point(bound_s, layers, raised, floors)

    def _columns_at(self, point: Point) -> Floats:
        """Return a point as values of the columns, [n]."""
        values = np.zeros(self.num_columns)
        values[1 : 1 + len(self._cells)] = point.layers[self._stage_of, self._run_of]
        stage, run = self._stage_of[self._raised_cells], self._run_of[self._raised_cells]
        for position, level in enumerate(self._raise):
            values[self._raised(position, self._raised_cells)] = point.raised[stage, run, level]
        if self._first_floor >= 0 and len(point.floors):
            values[self._first_floor :] = point.floors
        return values

    def weighted(self) -> tuple[Longs, Floats]:
        """Return the names of the paths that have a multiplier, and these, [n]."""
        weights = self._solver.multipliers()[self._first_path :]
        chosen = weights > 1e-9
        return self._names[chosen], weights[chosen]


def _on_own_columns(values: Floats) -> Floats:
    """Return rows [n, n k] with each row of `values` [n, k] in k columns of its own."""
    count, width = values.shape
    found = np.zeros((count, count, width))
    found[np.arange(count), np.arange(count)] = values
    return found.reshape(count, -1)


class _FloorLines(NamedTuple):
    """Lines of the ranks' hulls: rank, slope and constant [n], seconds; and the most that any hull asks for, [D]."""

    rank: Longs
    slope: Floats
    constant: Floats
    most: Floats


def _floor_lines(costs: CandidateCosts, rank_layers: tuple[Longs, Longs]) -> _FloorLines:
    """Return the lines of each rank's hull of recomputation above the weakest level's.

    There are none where ranks hold more than MOST_LISTED layers.
    """
    low, high = rank_layers
    base = int(np.argmax(costs.levels))
    if int(costs.levels.sum()) == 1 or int(high.max(initial=0)) > MOST_LISTED:
        return _FloorLines(np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0), np.zeros(len(low)))
    floors = recompute_floors(costs.rank_tables, low, high)
    each = float(costs.runs.recompute_s[base, costs.bulk_run])
    return _FloorLines(*lower_hulls(np.maximum(floors - each * (low[:, None] + np.arange(floors.shape[1])), 0.0), low))


@njit(cache=True)
def lower_hulls(values: Floats, first: Longs) -> tuple[Longs, Floats, Floats, Floats]:
    """Return rank, slope and constant of the lower hulls' lines through points (first + i, values [D, n]), and the most of each.

    Values that are infinite are no points. A hull of one point is a level line; lines that are nowhere positive are left out.
    """
    ranks, width = values.shape
    of_rank, slopes, constants = (
        np.empty(ranks * width, dtype=np.int64),
        np.empty(ranks * width),
        np.empty(ranks * width),
    )
    most = np.zeros(ranks)
    hull = np.empty(width, dtype=np.int64)
    number = 0
    for rank in range(ranks):
        own, size = values[rank], 0
        for place in range(width):
            if not np.isfinite(own[place]):
                continue
            most[rank] = max(most[rank], own[place])
            while size > 1:
                a, b = hull[size - 2], hull[size - 1]
                if (own[b] - own[a]) * (place - a) < (own[place] - own[a]) * (b - a):
                    break
                size -= 1
            hull[size] = place
            size += 1
        for place in range(max(size - 1, min(size, 1))):
            a, b = hull[place], hull[min(place + 1, size - 1)]
            if max(own[a], own[b]) > 0.0:
                slope = (own[b] - own[a]) / max(b - a, 1)
                of_rank[number], slopes[number] = rank, slope
                constants[number] = own[a] - slope * (first[rank] + a)
                number += 1
    return of_rank[:number], slopes[:number], constants[:number], most
