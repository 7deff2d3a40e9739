"""A linear program with few columns and many known rows, over the compiled dual simplex method (`dual_simplex`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stagewright.planner.search import dual_simplex
from stagewright.planner.search.dual_simplex import KNOWN, PIVOTS, Table, table_of

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

_BEYOND = 1e-6  # a row's implied limit is that far from what it can be
_ROOM = 192  # rows there is room for at first


class Basis(NamedTuple):
    """Rows at a limit [m], whether that is the lower one, and which columns [n] are not at one."""

    rows: Longs
    at_low: npt.NDArray[np.bool_]
    columns: npt.NDArray[np.bool_]


class LinearProgram:
    """min cost . x with limits on columns and rows; open for more rows and other limits. Kernels solve its `table`.

    Variables are the columns 0 .. n - 1, then the activities of the rows in the order in which they were added. Costs are at
    least zero, limits of columns finite, and so are those that `limit` sets, which never lie beyond those that rows were
    added under: a row without a limit has the one that the columns imply.
    """

    def __init__(self, lower: Floats, upper: Floats, cost: Floats, *, room: int = _ROOM) -> None:
        self.table: Table = table_of(lower, upper, cost, room)
        self.num_columns = len(lower)

    @property
    def num_rows(self) -> int:
        return int(self.table.size[KNOWN])

    @property
    def num_pivots(self) -> int:
        """Pivots made so far, in probes too."""
        return int(self.table.size[PIVOTS])

    def add(self, rows: Floats, low: Floats, high: Floats) -> None:
        """Add dense rows [m, n]; none of them costs anything before a solution misses it."""
        known, count = self.num_rows, self.num_columns
        total = known + len(rows)
        self.with_room(len(rows))
        self.table.rows[known:total] = rows
        least, most = self._reach(rows)
        self.table.low[count + known : count + total] = np.where(np.isinf(low), np.minimum(least, high), low)
        self.table.high[count + known : count + total] = np.where(np.isinf(high), np.maximum(most, low), high)
        self.table.size[KNOWN] = total

    def _reach(self, rows: Floats) -> tuple[Floats, Floats]:
        """Return the least and the most that rows can be within the limits of the columns, and a little."""
        low, high = self.table.low[: self.num_columns], self.table.high[: self.num_columns]
        middle, around = rows @ (0.5 * (low + high)), np.abs(rows) @ (0.5 * (high - low))
        least, most = middle - around, middle + around
        return least - _BEYOND * (1.0 + np.abs(least)), most + _BEYOND * (1.0 + np.abs(most))

    def basis(self) -> Basis:
        """Return the last basis."""
        count = self.num_columns
        rows, at_low, columns = np.empty(count, np.int64), np.empty(count, np.bool_), np.empty(count, np.bool_)
        number = dual_simplex.basis(self.table, rows, at_low, columns)
        return Basis(rows[:number], at_low[:number], columns)

    def start_at(self, basis: Basis) -> None:
        """Start from a basis, of another program that is like this one, before anything was solved."""
        dual_simplex.start_at(self.table, *basis)

    def with_room(self, number: int) -> Table:
        """Return the table, with room for more rows."""
        table, needed = self.table, self.num_rows + number
        if needed <= len(table.rows):
            return table
        more = max(needed, 2 * len(table.rows)) - len(table.rows)
        self.table = table._replace(
            rows=np.concatenate((table.rows, np.empty((more, self.num_columns)))),
            low=np.concatenate((table.low, np.empty(more))),
            high=np.concatenate((table.high, np.empty(more))),
            place=np.concatenate((table.place, np.full(more, -1))),
        )
        return self.table

    def limits(self, variables: Longs) -> tuple[Floats, Floats]:
        """Return the limits of some variables, [n] each."""
        return self.table.low[variables], self.table.high[variables]

    def limit(self, variables: int | Longs, low: float | Floats, high: float | Floats) -> None:
        """Set the limits of a variable, or of some, [n] each."""
        self.table.low[variables], self.table.high[variables] = low, high

    def probe(self, variable: int, low: float, high: float, limit: float, most_pivots: int) -> float:
        """Return what a few pivots prove under other limits of a variable, infinite from `limit` on."""
        return float(dual_simplex.probe(self.table, variable, low, high, limit, most_pivots))

    def columns(self) -> Floats:
        """Return the values of the columns, [n]."""
        values = np.empty(self.num_columns)
        dual_simplex.solution(self.table, values)
        return values

    def activities(self, rows: Longs, columns: Floats) -> Floats:
        """Return the activities of some rows at values of the columns, [m]."""
        return np.asarray(self.table.rows[rows] @ columns)

    def multipliers(self) -> Floats:
        """Return the multipliers of the rows, [m]; zero where a row does not bind."""
        found = np.empty(self.num_rows)
        dual_simplex.multipliers(self.table, found)
        return found

    def binding(self) -> npt.NDArray[np.bool_]:
        """Return which rows are at a limit in the last basis, [m]."""
        return np.asarray(self.table.place[self.num_columns : self.num_columns + self.num_rows] <= -2)
