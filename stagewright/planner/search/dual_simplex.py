"""The dual simplex method for small dense linear programs of which few rows bind, compiled.

    min  c . x    s.t.  low <= (x, A x) <= high

Every variable, a column or the activity of a row, is basic or nonbasic at one of its limits. The table holds the basic
ones of the rows that were looked at as linear forms of the nonbasic ones, [m, n], and reduced costs are the objective
as such a form; they keep the sign that makes it least, so the objective is a lower bound at any time. A pivot takes the
basic variable that is furthest beyond a limit (steepest edge, whose norms the dense table gives exactly) against a
nonbasic one whose reduced cost gets to zero (Harris' two passes): all variables have two limits, so those where that happens
first go to their other limit as long as the row stays beyond its own (the long step), O(m n).

Rows are known first and enter the table where a solution misses them; rows that are basic say nothing and leave it. So
programs of hundreds of known rows are solved in tables of tens. Limits may change between solves, variables go to the one
that their reduced cost asks for, and the method goes on from where it was, or from the basis of another program that is like
this one: so all limits are finite.

Nothing rests on the table's rounding: `proved` takes the multipliers alone, clips their signs, and adds up what the rows'
limits and the columns' limits give in the numbers of the program (Neumaier and Shcherbina, Mathematical Programming 99,
2004). A program without a solution has multipliers whose sum passes any number.

Paper: Koberstein, The dual simplex method, techniques for a fast and stable implementation (2005).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.copying import copy_into

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NONE = np.int64(-1)  # typed: called functions are compiled for the number -1 too where it stands as such
OPTIMAL, ABOVE, STOPPED = range(3)  # ABOVE: the optimum is proved to be at least the limit, or there is none
KNOWN, HELD, PIVOTS, CHECKED = range(4)  # entries of Table.size
_FEASIBLE = 1e-9
_DUAL = 1e-10
_NOTHING = 1e-9  # of a reduced cost, that moves no variable to its other limit
_PIVOT = 1e-7
_MISSED = 1e-7
_CLEARLY = 1e-9  # of the limit, by which the table's bound passes it before the multipliers are asked
_DRIFT = 1e-6
_MOST_REBUILT = 8
_TRUSTED = 128  # pivots between two looks at the drift
_ENTER = 12  # missed rows that enter at once
_SPARE = 48  # rows of the table beyond its columns
_MOST_PIVOTS = 20_000
_STALLED = 256  # pivots that raise nothing, behind which costs are shifted
_SHIFT = 1e-8


class Table(NamedTuple):
    """A program and its basis, overwritten in place; variables are columns 0 .. n - 1, then rows.

    `rows` [M, n] with room for M rows, `low` and `high` [n + M], `cost` [n]; `table` [n + spare, n], `basic`, `value` and
    `norm` of its rows, `nonbasic`, `reduced` and `at` of its columns; `place` [n + M] is a row of the table, -1 for a row
    that is only known, or -2 - column of the table. `size` counts known rows, rows of the table, pivots, and
    those at the last look at how far rounding has led.
    """

    rows: Floats
    low: Floats
    high: Floats
    cost: Floats
    table: Floats
    basic: Longs
    value: Floats
    norm: Floats
    nonbasic: Longs
    reduced: Floats
    at: Floats
    place: Longs
    size: Longs


def table_of(lower: Floats, upper: Floats, cost: Floats, room: int) -> Table:
    """Return the table of a program without rows and with room for some; the columns are at their lower limits.

    Costs are at least zero, and limits finite.
    """
    count = len(lower)
    most = count + _SPARE
    return Table(
        rows=np.empty((room, count)),
        low=np.concatenate((lower, np.empty(room))),
        high=np.concatenate((upper, np.empty(room))),
        cost=cost,
        table=np.empty((most, count)),
        basic=np.empty(most, dtype=np.int64),
        value=np.empty(most),
        norm=np.empty(most),
        nonbasic=np.arange(count),
        reduced=cost.copy(),
        at=lower.copy(),
        place=np.concatenate((-2 - np.arange(count), np.full(room, -1))),
        size=np.zeros(4, dtype=np.int64),
    )


@njit(cache=True, no_cpython_wrapper=True)
def solve(t: Table, limit: float, most_pivots: int) -> int:
    """Solve until the optimum of all known rows, until it is proved to be at least `limit`, or for so many pivots."""
    last = t.size[PIVOTS] + min(most_pivots, _MOST_PIVOTS)
    ray = np.zeros(len(t.at))
    rebuilt, rebuilt_at = 0, -1
    most = _nothing_yet(t)
    _settle(t)
    while True:
        status, row = _iterate(t, limit + _CLEARLY * abs(limit), last, most)
        if status == STOPPED:
            return STOPPED
        if status == ABOVE:
            if proved(t, limit, row, ray) >= limit:
                return ABOVE
            if rebuilt_at == t.size[PIVOTS] or rebuilt == _MOST_REBUILT:
                return STOPPED
        elif (
            rebuilt == _MOST_REBUILT
            or rebuilt_at == t.size[PIVOTS]
            or t.size[PIVOTS] < t.size[CHECKED] + _TRUSTED
            or _drift(t) <= _DRIFT
        ):
            if not _enter_missed(t):
                return OPTIMAL
            continue
        _rebuild(t)
        _settle(t)
        rebuilt, rebuilt_at = rebuilt + 1, t.size[PIVOTS]
        most = _nothing_yet(t)


@njit(cache=True, nogil=True)
def probe(t: Table, variable: int, low: float, high: float, limit: float, most_pivots: int) -> float:
    """Return a bound of the program under other limits of one variable after so many pivots, infinite from `limit` on.

    The table stays as it is.
    """
    own = _copied(t)
    before = (t.low[variable], t.high[variable])
    if own.place[variable] == -1:
        _make_room(own)
        _enter(own, variable - len(own.at))
    t.low[variable], t.high[variable] = low, high
    _settle(own)
    status, row = _iterate(own, limit, own.size[PIVOTS] + most_pivots, _nothing_yet(own))
    bound = proved(own, limit, row if status == ABOVE else NONE, np.zeros(len(own.at)))
    t.low[variable], t.high[variable] = before
    t.size[PIVOTS] = own.size[PIVOTS]
    return np.inf if bound >= limit else bound


@njit(cache=True, no_cpython_wrapper=True)
def _copied(t: Table) -> Table:
    """Return a table with a basis of its own over the same program."""
    held, known = t.size[HELD], t.size[KNOWN] + len(t.at)
    table, basic, value, norm = (
        np.empty_like(t.table),
        np.empty_like(t.basic),
        np.empty_like(t.value),
        np.empty_like(t.norm),
    )
    for row in range(held):
        copy_into(table[row], t.table[row])
        basic[row], value[row], norm[row] = t.basic[row], t.value[row], t.norm[row]
    place = np.empty_like(t.place)
    copy_into(place, t.place[:known])
    return Table(
        t.rows, t.low, t.high, t.cost, table, basic, value, norm,
        t.nonbasic.copy(), t.reduced.copy(), t.at.copy(), place, t.size.copy(),
    )  # fmt: skip


@njit(cache=True, no_cpython_wrapper=True)
def proved(t: Table, limit: float, row: int, left: Floats) -> float:
    """Return the bound that the multipliers prove, by the program's own numbers; `left` [n] is overwritten.

    `row` is a row of the table that shows that there is no solution, -1 for none: as much of it is added as makes the bound
    pass `limit`.
    """
    count = len(t.at)
    share = 0.0
    if row >= 0:
        variable = t.basic[row]
        sign = 1.0 if t.value[row] < t.low[variable] else -1.0
        miss = t.low[variable] - t.value[row] if sign > 0.0 else t.value[row] - t.high[variable]
        total, least = 0.0, 0.0
        for place in range(count):
            total += t.reduced[place] * t.at[place]
            low, high = t.low[t.nonbasic[place]], t.high[t.nonbasic[place]]
            if low < high and (t.at[place] == low) != (t.reduced[place] > 0.0):  # it was passed
                least = max(least, abs(t.reduced[place]) / max(abs(t.table[row, place]), _PIVOT))
        share = max((max(limit - total, 0.0) + 1e-6 * abs(limit) + 1e-9) / max(miss, 1e-300), least)
        share *= sign
    for place in range(count):
        left[place] = t.cost[place]
    bound = 0.0
    for place in range(count + (1 if row >= 0 else 0)):
        if place < count:
            variable = t.nonbasic[place]
            weight = t.reduced[place] - (share * t.table[row, place] if row >= 0 else 0.0)
        else:
            variable, weight = t.basic[row], share
        if variable < count:
            continue
        end = t.low[variable] if weight > 0.0 else t.high[variable]
        if weight == 0.0:
            continue
        bound += weight * end
        line = t.rows[variable - count]
        for column in range(count):
            left[column] -= weight * line[column]
    for column in range(count):
        bound += left[column] * (t.low[column] if left[column] > 0.0 else t.high[column])
    return bound


@njit(cache=True)
def solution(t: Table, values: Floats) -> None:
    """Fill the values of the columns, [n]."""
    count = len(t.at)
    for column in range(count):
        place = t.place[column]
        values[column] = t.value[place] if place >= 0 else t.at[-2 - place]


@njit(cache=True)
def multipliers(t: Table, found: Floats) -> None:
    """Fill the multipliers of all known rows, [known]."""
    count = len(t.at)
    found[:] = 0.0
    for place in range(count):
        if t.nonbasic[place] >= count:
            found[t.nonbasic[place] - count] = t.reduced[place]


@njit(cache=True, no_cpython_wrapper=True)
def _settle(t: Table) -> None:
    """Put the nonbasic variables where their reduced costs ask for, and the basic ones where that leads."""
    count = len(t.at)
    for place in range(count):
        variable = t.nonbasic[place]
        low, high = t.low[variable], t.high[variable]
        end = low if t.reduced[place] > 0.0 else high
        if abs(t.reduced[place]) <= _NOTHING:
            end = low if abs(t.at[place] - low) <= abs(t.at[place] - high) else high
        t.at[place] = end
    for row in range(t.size[HELD]):
        t.value[row] = np.dot(t.table[row], t.at)


@njit(cache=True, no_cpython_wrapper=True)
def _iterate(t: Table, limit: float, last: int, most: Floats) -> tuple[int, int]:
    """Pivot until the table is optimal or its bound is at least the limit; with the row that has no solution, or -1.

    `most` [2] are the highest bound before and the pivots until then: rows that come and go may lead in circles too.
    """
    count = len(t.at)
    total = 0.0
    for place in range(count):
        total += t.reduced[place] * t.at[place]
    passed, able = np.zeros(count, dtype=np.bool_), np.empty(count, dtype=np.int64)
    while True:
        if total >= limit:
            return ABOVE, -1
        if total - most[0] > _CLEARLY * abs(total):
            most[0], most[1] = total, t.size[PIVOTS]
        elif t.size[PIVOTS] >= most[1] + _STALLED:
            _shift(t)
            most[1] = t.size[PIVOTS]
        row = _leaving(t.basic, t.value, t.norm, t.low, t.high, t.size[HELD])
        if row < 0:
            return OPTIMAL, -1
        variable, value = t.basic[row], t.value[row]
        sign, end = (1.0, t.low[variable]) if value < t.low[variable] else (-1.0, t.high[variable])
        little = _MISSED * (1.0 + abs(value))
        column = _entering(t, row, sign, abs(end - value) - little, passed, able)
        if column < 0:
            if abs(end - value) <= little:
                t.norm[row] = np.inf  # as good as met, and nothing moves it
                continue
            _flip(t, passed)  # from there on the objective rises without an end
            return ABOVE, row
        if t.size[PIVOTS] >= last:
            return STOPPED, -1
        t.size[PIVOTS] += 1
        total += _flip(t, passed)
        step = (end - t.value[row]) / t.table[row, column]
        total += t.reduced[column] * step
        _pivot(t, row, column, step, end)


@njit(cache=True, no_cpython_wrapper=True)
def _nothing_yet(t: Table) -> Floats:
    """Return the highest bound and the pivots until then, [2], before the first one."""
    return np.array([-np.inf, t.size[PIVOTS]])


@njit(cache=True, no_cpython_wrapper=True)
def _shift(t: Table) -> None:
    """Move reduced costs away from zero, each by another little: most are equal where pivots go round in circles.

    Multipliers prove what they prove, whatever they are.
    """
    for place in range(len(t.at)):
        variable = t.nonbasic[place]
        if t.low[variable] < t.high[variable] and abs(t.reduced[place]) < _SHIFT:
            little = _SHIFT * (1.0 + (0.6180339887 * (variable + t.size[PIVOTS])) % 1.0)
            t.reduced[place] += little if t.at[place] == t.low[variable] else -little


@njit(cache=True, no_cpython_wrapper=True)
def _leaving(basic: Longs, value: Floats, norm: Floats, low: Floats, high: Floats, held: int) -> int:
    """Return the row whose basic variable is furthest beyond a limit, -1 for none."""
    row, most = -1, 0.0
    for place in range(held):
        variable, now = basic[place], value[place]
        miss = max(low[variable] - now, now - high[variable])
        if miss > _FEASIBLE * (1.0 + abs(now)) and miss * miss > most * norm[place]:
            row, most = place, miss * miss / norm[place]
    return row


@njit(cache=True, no_cpython_wrapper=True)
def _entering(t: Table, row: int, sign: float, miss: float, passed: Bools, able: Longs) -> int:
    """Return the column against which a row whose value has to rise (sign 1) or fall is exchanged; -1 for none.

    Columns whose reduced costs get to zero first go to their other limit, `passed`, as long as that moves the row by less than
    `miss` (the long step); the first that would move it further, or has no other limit, enters. `able` [n] is overwritten.
    """
    line = t.table[row]
    passed[:] = False
    number = 0
    for place in range(len(line)):
        able[number] = place
        number += _may_move(t, place, sign * line[place])
    while True:
        most = np.inf
        for place in able[:number]:
            most = min(most, (abs(t.reduced[place]) + _DUAL) / abs(line[place]))
        best, column, gained = 0.0, -1, 0.0
        for place in able[:number]:
            slope = abs(line[place])
            if abs(t.reduced[place]) > most * slope:
                continue
            gained += slope * (t.high[t.nonbasic[place]] - t.low[t.nonbasic[place]])
            if slope > best:
                best, column = slope, place
        if column < 0 or gained >= miss:
            return column
        miss -= gained
        left = 0
        for place in able[:number]:
            if abs(t.reduced[place]) <= most * abs(line[place]):
                passed[place] = True
            else:
                able[left] = place
                left += 1
        number = left


@njit(cache=True, no_cpython_wrapper=True)
def _flip(t: Table, passed: Bools) -> float:
    """Put columns at their other limits; return what that adds to the objective."""
    added = 0.0
    for place in range(len(passed)):
        if not passed[place]:
            continue
        variable = t.nonbasic[place]
        low, high = t.low[variable], t.high[variable]
        move = high - low if t.at[place] == low else low - high
        t.at[place] = high if t.at[place] == low else low
        added += t.reduced[place] * move
        for row in range(t.size[HELD]):
            t.value[row] += t.table[row, place] * move
    return added


@njit(cache=True, inline="always", no_cpython_wrapper=True)
def _may_move(t: Table, place: int, slope: float) -> bool:
    """Tell whether a nonbasic variable can move so that a row with that slope, large enough for a pivot, rises."""
    low, high = t.low[t.nonbasic[place]], t.high[t.nonbasic[place]]
    if abs(slope) <= _PIVOT or low == high:
        return False
    return bool((t.at[place] == low) == (slope > 0.0))


@njit(cache=True, no_cpython_wrapper=True)
def _pivot(t: Table, row: int, column: int, step: float, end: float) -> None:
    """Exchange a basic variable, which goes to its limit `end`, for a nonbasic one, which moves by `step`."""
    pivot = t.table[row, column]
    line = t.table[row] * (-1.0 / pivot)  # apart from the table, or the loop over columns is not vectorized
    line[column] = 0.0
    _eliminate(t.table, t.norm, t.value, line, row, column, t.size[HELD], step, pivot)
    cost = t.reduced[column]
    if cost != 0.0:
        for place in range(len(line)):
            t.reduced[place] += cost * line[place]
    t.reduced[column] = cost / pivot
    line[column] = 1.0 / pivot
    copy_into(t.table[row], line)
    t.norm[row] = 1.0 + np.dot(line, line)
    leaving, entering = t.basic[row], t.nonbasic[column]
    t.value[row] = t.at[column] + step
    t.basic[row], t.nonbasic[column] = entering, leaving
    t.place[entering], t.place[leaving] = row, -2 - column
    t.at[column] = end


@njit(cache=True, fastmath={"reassoc", "contract"}, no_cpython_wrapper=True)
def _eliminate(
    table: Floats, norm: Floats, value: Floats, line: Floats, row: int, column: int, held: int, step: float, pivot: float
) -> None:  # fmt: skip
    """Write the entering variable as the form `line`, with the leaving one in its column, into the other rows."""
    for other in range(held):
        factor = table[other, column]
        if other == row or factor == 0.0:
            continue
        table[other, column] = 0.0
        square = 1.0
        for place in range(len(line)):
            entry = table[other, place] + factor * line[place]
            table[other, place] = entry
            square += entry * entry
        table[other, column] = factor / pivot
        norm[other] = square + table[other, column] * table[other, column]
        value[other] += factor * step


@njit(cache=True, no_cpython_wrapper=True)
def _enter(t: Table, known: int) -> None:
    """Write a known row as a form of the nonbasic variables, as one more row of the table."""
    count, row = len(t.at), t.size[HELD]
    line = np.zeros(count)
    _substitute(t.rows[known], t.place, t.table, line)
    copy_into(t.table[row], line)
    t.norm[row] = 1.0 + np.dot(line, line)
    t.value[row] = np.dot(line, t.at)
    t.basic[row] = count + known
    t.place[count + known] = row
    t.size[HELD] += 1


@njit(cache=True, no_cpython_wrapper=True)
def _substitute(known: Floats, place: Longs, table: Floats, line: Floats) -> None:
    """Add a row over the columns to `line`, over the nonbasic variables."""
    for column in range(len(known)):
        factor, where = known[column], place[column]
        if factor == 0.0:
            continue
        if where < 0:
            line[-2 - where] += factor
            continue
        for other in range(len(line)):
            line[other] += factor * table[where, other]


@njit(cache=True, no_cpython_wrapper=True)
def _leave(t: Table, row: int) -> None:
    """Take a basic row out of the table."""
    last = t.size[HELD] - 1
    t.place[t.basic[row]] = -1
    if row < last:
        copy_into(t.table[row], t.table[last])
        t.basic[row], t.value[row], t.norm[row] = t.basic[last], t.value[last], t.norm[last]
        t.place[t.basic[row]] = row
    t.size[HELD] = last


@njit(cache=True, no_cpython_wrapper=True)
def _make_room(t: Table) -> None:
    """Take idle rows out of the table where they are many."""
    count = len(t.at)
    idle = 0
    for row in range(t.size[HELD]):
        idle += t.basic[row] >= count
    if idle + _ENTER <= _SPARE:
        return
    for row in range(t.size[HELD] - 1, -1, -1):
        if t.basic[row] >= count:
            _leave(t, row)


@njit(cache=True, no_cpython_wrapper=True)
def _enter_missed(t: Table) -> bool:
    """Let the known rows that the solution misses most into the table; tell whether there are any."""
    count = len(t.at)
    values = np.empty(count)
    solution(t, values)
    found = np.full(_ENTER, -1)
    short = np.zeros(_ENTER)
    number = 0
    objective = abs(np.dot(t.cost, values))
    activities = np.dot(t.rows[: t.size[KNOWN]], values)
    for known in range(t.size[KNOWN]):
        if t.place[count + known] != -1:
            continue
        miss = max(t.low[count + known] - activities[known], activities[known] - t.high[count + known])
        if miss <= _MISSED or (number == _ENTER and miss <= short[-1]):
            continue
        # A row with the objective in it is as long as it.
        if miss <= _MISSED * abs(np.dot(t.rows[known], t.cost)) * objective:
            continue
        place = min(number, _ENTER - 1)
        while place > 0 and short[place - 1] < miss:
            short[place], found[place] = short[place - 1], found[place - 1]
            place -= 1
        short[place], found[place] = miss, known
        number = min(number + 1, _ENTER)
    if number:
        _make_room(t)
    for place in range(number):
        _enter(t, found[place])
    return number > 0


@njit(cache=True, no_cpython_wrapper=True)
def _drift(t: Table) -> float:
    """Return how far the rows of the table are from what the columns make them, as a share of 1 and the objective."""
    count = len(t.at)
    t.size[CHECKED] = t.size[PIVOTS]
    values = np.empty(count)
    solution(t, values)
    most = 0.0
    for row in range(t.size[HELD]):
        if t.basic[row] >= count:
            most = max(most, abs(np.dot(t.rows[t.basic[row] - count], values) - t.value[row]))
    for place in range(count):
        if t.nonbasic[place] >= count:
            most = max(most, abs(np.dot(t.rows[t.nonbasic[place] - count], values) - t.at[place]))
    return most / (1.0 + abs(float(np.dot(t.cost, values))))


@njit(cache=True, no_cpython_wrapper=True)
def _rebuild(t: Table) -> None:
    """Make the table anew from the program's numbers, with the same basis as far as pivots allow."""
    count = len(t.at)
    rows, at_low, wanted = np.empty(count, np.int64), np.empty(count, np.bool_), np.empty(count, np.bool_)
    number = basis(t, rows, at_low, wanted)
    ends = np.empty(count)
    for column in range(count):
        place = t.place[column]
        ends[column] = t.low[column] if place >= 0 else t.at[-2 - place]
    t.place[count : count + t.size[KNOWN]] = -1
    t.size[HELD] = 0
    for column in range(count):
        t.nonbasic[column], t.reduced[column], t.at[column] = column, t.cost[column], ends[column]
        t.place[column] = -2 - column
    start_at(t, rows[:number], at_low[:number], wanted)


@njit(cache=True)
def start_at(t: Table, rows: Longs, at_low: Bools, wanted: Bools) -> None:
    """Exchange known rows, each at its lower or upper limit, for the wanted columns [n], as far as pivots allow.

    The table holds no row before, and is not settled behind.
    """
    for known in rows:
        _enter(t, known)
    for row in range(len(rows)):
        best, column = _PIVOT, len(wanted)
        for place in range(len(wanted)):
            if t.nonbasic[place] < len(wanted) and wanted[t.nonbasic[place]] and abs(t.table[row, place]) > best:
                best, column = abs(t.table[row, place]), place
        if column < len(wanted):
            end = t.low[t.basic[row]] if at_low[row] else t.high[t.basic[row]]
            _pivot(t, row, column, 0.0, end)


@njit(cache=True)
def basis(t: Table, rows: Longs, at_low: Bools, columns: Bools) -> int:
    """Fill the known rows at a limit [n], whether it is the lower one, and which columns [n] are basic; return their number."""
    count, number = len(t.at), 0
    for place in range(count):
        variable = t.nonbasic[place]
        columns[place] = t.place[place] >= 0
        if variable >= count:
            rows[number], at_low[number] = variable - count, t.at[place] == t.low[variable]
            number += 1
    return number
