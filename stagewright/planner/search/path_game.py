"""The best convex combination of critical paths against the best combination of partitions: a small linear programme.

    min z   s.t.  z >= sum_k a[c, k] m_k  for every path c,   sum_k m_k = 1,  m >= 0

with a[c, k] the length of path c in partition k. The multipliers of the rows weigh the paths; the least weighted sum over
all partitions (`stage_ranges.weighted_path`) is then a lower bound on every partition's makespan, because a makespan is
at least every path and so at least their combination. Both sides grow until neither finds anything better: the
Lagrangian bound by column generation (Dantzig and Wolfe, 1960). The bound is that of the weights, clipped to be at least
0 and scaled to a sum of 1; nothing the solver says is trusted.
"""

from __future__ import annotations

from typing import NamedTuple

import highspy
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Mixtures(NamedTuple):
    """The value, the weights of the paths [C] and those of the partitions [K]; both sum to 1."""

    value: float
    paths: Floats
    partitions: Floats


def play(lengths: Floats) -> Mixtures | None:
    """Return the solution for lengths [C, K]; None when the solver gives up."""
    num_paths, num_partitions = lengths.shape
    scale = 1.0 / max(float(lengths.max()), 1e-300)
    solver = highspy.Highs()
    for option, setting in (("output_flag", False), ("presolve", "off"), ("threads", 1)):
        solver.setOptionValue(option, setting)
    solver.addVar(-highspy.kHighsInf, highspy.kHighsInf)
    solver.changeColCost(0, 1.0)
    solver.addVars(num_partitions, np.zeros(num_partitions), np.full(num_partitions, highspy.kHighsInf))
    columns = np.arange(num_partitions + 1, dtype=np.int32)
    for row in lengths:
        solver.addRow(0.0, highspy.kHighsInf, len(columns), columns, np.concatenate((np.ones(1), -row * scale)))
    solver.addRow(1.0, 1.0, num_partitions, columns[1:], np.ones(num_partitions))
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    solution = solver.getSolution()
    paths = np.maximum(np.array(solution.row_dual)[:num_paths], 0.0)
    partitions = np.maximum(np.array(solution.col_value)[1:], 0.0)
    if paths.sum() <= 0.0 or partitions.sum() <= 0.0:
        return None
    value = float(solver.getInfo().objective_function_value) / scale
    return Mixtures(value, paths / float(paths.sum()), partitions / float(partitions.sum()))
