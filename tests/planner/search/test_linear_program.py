"""The compiled dual simplex method against HiGHS, and its bounds against arithmetic."""

from __future__ import annotations

import highspy
import numpy as np
import pytest
from numba import njit

from stagewright.planner.search.dual_simplex import ABOVE, OPTIMAL, _shift, proved, solve
from stagewright.planner.search.linear_program import LinearProgram

_LIMIT = 1e6


# For Python, which what they call has no wrapper for.
@njit
def solved(table, limit, most_pivots):
    return solve(table, limit, most_pivots)


@njit
def shifted(table):
    _shift(table)


@njit
def proved_bound(table, limit, row, left):
    return proved(table, limit, row, left)


def _solved(program: LinearProgram, limit: float) -> float:
    """The proved optimum; infinite where it is proved to be at least `limit`."""
    status = solved(program.table, limit, 2**31 - 1)
    if status == ABOVE:
        return float("inf")
    assert status == OPTIMAL
    return proved_bound(program.table, limit, -1, np.empty(program.num_columns))


def _random(seed: int):
    """A program with finite columns, two-sided, one-sided and equal rows, often degenerate, sometimes without a solution."""
    draw = np.random.default_rng(seed)
    count, rows = int(draw.integers(2, 30)), int(draw.integers(1, 120))
    lower = draw.integers(0, 2, count).astype(float)
    upper = lower + draw.integers(0, 6, count)
    cost = np.zeros(count)
    cost[0] = 1.0
    upper[0] = 1e3
    lower[0] = 0.0
    matrix = np.where(draw.random((rows, count)) < 0.5, draw.integers(-3, 4, (rows, count)), 0).astype(float)
    matrix[rows // 3 :, 0] = 1.0
    inside = matrix @ (lower + (upper - lower) * draw.random(count))
    low = np.where(draw.random(rows) < 0.7, np.floor(inside) - draw.integers(0, 3, rows), -np.inf)
    high = np.where(draw.random(rows) < 0.3, np.ceil(inside), np.inf)
    high[: rows // 8] = low[: rows // 8] = np.round(inside[: rows // 8])
    return lower, upper, cost, matrix, low, high


def _reference(lower, upper, cost, matrix, low, high) -> float:
    """The optimum by HiGHS; infinite for none."""
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.addVars(len(cost), lower, upper)
    solver.changeColsCost(len(cost), np.arange(len(cost), dtype=np.int32), cost)
    index = np.arange(len(cost), dtype=np.int32)
    for row, least, most in zip(matrix, low, high, strict=True):
        solver.addRow(least, most, len(index), index, row)
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return float("inf")
    assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return float(solver.getInfo().objective_function_value)


def test_shifted_costs_lead_to_the_same_optimum_and_prove_it() -> None:
    proofs = 0
    for seed in range(200):
        parts = lower, upper, cost, matrix, low, high = _random(seed)
        expected = _reference(*parts)
        program = LinearProgram(lower, upper, cost)
        program.add(matrix, low, high)
        shifted(program.table)
        assert (program.table.reduced[upper > lower] > 0.0).all()  # costs are zero but for one
        found = _solved(program, _LIMIT)
        if expected < _LIMIT:
            assert expected - 1e-4 <= found <= expected + 1e-9 * max(1.0, abs(expected)), seed
            proofs += 1
        else:
            assert found == float("inf"), seed
    assert proofs >= 100


def test_optima_are_those_of_highs_and_of_solutions_within_their_limits() -> None:
    impossible = 0
    for seed in range(300):
        parts = lower, upper, cost, matrix, low, high = _random(seed)
        program = LinearProgram(lower, upper, cost)
        half = len(matrix) // 2
        program.add(matrix[:half], low[:half], high[:half])
        _solved(program, _LIMIT)
        program.add(matrix[half:], low[half:], high[half:])
        value, reference = _solved(program, _LIMIT), _reference(*parts)
        assert value == pytest.approx(reference, abs=1e-6), seed
        impossible += np.isinf(reference)
        if np.isfinite(reference):
            columns = program.columns()
            activity = matrix @ columns
            assert ((columns >= lower - 1e-6) & (columns <= upper + 1e-6)).all()
            assert ((activity >= low - 1e-5) & (activity <= high + 1e-5)).all()
            assert cost @ columns == pytest.approx(reference, abs=1e-5)
    assert 20 <= impossible <= 280


def test_other_limits_change_the_optimum_as_in_a_new_program_and_a_probe_changes_nothing() -> None:
    compared = 0
    for seed in range(300, 420):
        lower, upper, cost, matrix, low, high = _random(seed)
        program = LinearProgram(lower, upper, cost)
        program.add(matrix, low, high)
        before = _solved(program, _LIMIT)
        if not np.isfinite(before):
            continue
        draw = np.random.default_rng(seed)
        for column in draw.integers(1, len(cost), 4).tolist():
            middle = float(np.floor(0.5 * (lower[column] + upper[column])))
            closed = upper.copy()
            closed[column] = middle
            reference = _reference(lower, closed, cost, matrix, low, high)
            assert program.probe(column, lower[column], middle, _LIMIT, 5) <= reference + 1e-6
            assert _solved(program, _LIMIT) == pytest.approx(before, abs=1e-6)
            program.limit(column, lower[column], middle)
            assert _solved(program, _LIMIT) == pytest.approx(reference, abs=1e-6), seed
            program.limit(column, lower[column], upper[column])
            assert _solved(program, _LIMIT) == pytest.approx(before, abs=1e-6), seed
            compared += 1
    assert compared >= 60


def test_the_basis_of_a_program_that_differs_little_leads_to_the_same_optimum_with_fewer_pivots() -> None:
    compared = afresh = led = 0
    for seed in range(540, 660):
        lower, upper, cost, matrix, low, high = _random(seed)
        first = LinearProgram(lower, upper, cost)
        first.add(matrix, low, high)
        _solved(first, _LIMIT)
        draw = np.random.default_rng(seed)
        moved = matrix * (1.0 + 1e-3 * draw.random(matrix.shape))
        programs = LinearProgram(lower, upper, cost), LinearProgram(lower, upper, cost)
        for program in programs:
            program.add(moved, low, high)
        programs[1].start_at(first.basis())
        before = programs[1].num_pivots
        values = [_solved(program, _LIMIT) for program in programs]
        assert values[1] == pytest.approx(values[0], abs=1e-6), seed
        afresh += programs[0].num_pivots
        led += programs[1].num_pivots - before
        compared += np.isfinite(values[0])
    assert compared >= 30
    assert led < 0.5 * afresh


def test_rows_without_the_objective_are_met_closely_where_the_objective_is_large() -> None:
    compared = 0
    for seed in range(420, 540):
        lower, upper, cost, matrix, low, high = _random(seed)
        priced = matrix[:, 0] == 1.0
        matrix[priced, 1:] *= 1e3
        low[priced], high[priced] = low[priced] * 1e3, np.inf
        matrix[~priced, 0] = 0.0
        upper[0] = 1e6
        program = LinearProgram(lower, upper, cost)
        program.add(matrix, low, high)
        value = _solved(program, 1e6)
        if not np.isfinite(value):
            continue
        activity = (matrix @ program.columns())[~priced]
        assert ((activity >= low[~priced] - 1e-6) & (activity <= high[~priced] + 1e-6)).all(), seed
        compared += value > 1e3
    assert compared >= 8


def test_a_program_stops_where_its_bound_passes_the_limit() -> None:
    rows = np.array([[1.0, -1.0], [1.0, 1.0]])
    program = LinearProgram(np.zeros(2), np.array([100.0, 10.0]), np.array([1.0, 0.0]))
    program.add(rows, np.array([1.0, 5.0]), np.full(2, np.inf))
    assert _solved(program, 2.9) == np.inf
    assert _solved(program, 3.1) == pytest.approx(3.0)  # x = 2, as far from both rows
    assert program.multipliers() == pytest.approx([0.5, 0.5])
    assert program.binding().tolist() == [True, True]
