"""Which part of a problem's space a published planner can speak of.

A paper's planner knows some parallel dimensions and one schedule. `Reach` says which; `configurations` returns those of
the problem's own space (pins and forbids applied) that lie within it, so that every plan a named planner makes is one
that the exact planner considers too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.search.layer_costs import Configuration
from stagewright.planner.search.pricing import AXES, CP, DP, EP, PP, SP, TP, VOCAB, ZERO, configuration_of
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.space import FamilyRule


@dataclass(frozen=True)
class Reach:
    """The dimensions that a planner chooses.

    Parameters
    ----------
    schedule : the one schedule its plans run.
    tensor, pipeline, data, context, experts : whether the degree may exceed 1.
    zero : ZeRO stages.
    axis_orders : whether replicas may also lie across nodes.
    devices : all of the cluster, or any number.
    """

    schedule: str = "1f1b"
    tensor: bool = False
    pipeline: bool = True
    data: bool = True
    context: bool = False
    experts: bool = False
    zero: tuple[int, ...] = (0,)
    axis_orders: bool = False
    devices: Literal["all", "any"] = "all"


def rule_of(problem: Problem, reach: Reach) -> FamilyRule:
    """Return the family that the planner's plans run; raises InvalidArgument when the problem does not allow it."""
    for rule in problem.rules:
        if rule.name == reach.schedule:
            return rule
    raise InvalidArgument(
        f"this planner runs {reach.schedule}, the problem allows {', '.join(rule.name for rule in problem.rules)}",
        field="space.schedules",
        hint=f"allow {reach.schedule}, or take another planner",
    )


def configurations(problem: Problem, reach: Reach) -> list[Configuration]:
    """Return the configurations within reach, in the problem's order.

    Sequence and vocabulary parallelism are on wherever the problem has them on: no published planner chooses them.
    Raises InvalidArgument when the problem's space has none.
    """
    rule = rule_of(problem, reach)
    rows = problem.priced.shape
    keep = np.isin(rows[:, ZERO], reach.zero)
    for column, allowed in (
        (TP, reach.tensor),
        (PP, reach.pipeline),
        (CP, reach.context),
        (EP, reach.experts),
        (DP, reach.data),
        (AXES, reach.axis_orders),
    ):
        if not allowed:
            keep &= rows[:, column] == (0 if column == AXES else 1)
    rows = rows[keep]
    for column in (SP, VOCAB):
        if len(rows):
            others = np.delete(rows, [SP, VOCAB], axis=1)
            _, group = np.unique(others, axis=0, return_inverse=True)
            most = np.zeros(group.max() + 1, dtype=rows.dtype)
            np.maximum.at(most, np.ravel(group), rows[:, column])
            rows = rows[rows[:, column] == most[np.ravel(group)]]
    found = [
        configuration
        for configuration in map(configuration_of, rows)
        if (reach.devices == "any" or configuration.num_devices == problem.num_devices)
        and (configuration.num_ranks == 1 or rule.fits(configuration.num_ranks, configuration.num_microbatches, 1))
    ]
    if not found:
        raise InvalidArgument(
            f"none of the {len(problem.priced)} configurations of this problem is one the planner knows: "
            + _words(reach),
            field="planner",
            hint="drop pins, or take the exact planner",
        )
    return found


def _words(reach: Reach) -> str:
    known = {"dp": reach.data, "tp": reach.tensor, "pp": reach.pipeline, "cp": reach.context, "ep": reach.experts}
    names = ", ".join(name for name, allowed in known.items() if allowed)
    return f"{names} on {reach.schedule} with ZeRO {', '.join(map(str, reach.zero))}"
