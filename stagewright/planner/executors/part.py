"""A part of the space and its answer: what travels to an executor's workers and back.

A part is the question with the pipeline depth pinned, so that parts are disjoint and together the whole space. A part's
search stops at bounds that another part's plan already beats; its own bound then is that of the other's plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.search.exact import solve
from stagewright.planner.search.limits import KnownStep, Limits
from stagewright.planner.search.problem import Problem


@dataclass(frozen=True)
class Part:
    """One part of a question.

    Parameters
    ----------
    only_counts, most_bytes : limits of the problem (`Problem`).
    deadline_s : from the moment the part starts; None without one.
    """

    profile: ModelProfile
    cluster: Cluster
    job: TrainingJob
    num_devices: int
    only_counts: tuple[int, ...] | None
    most_bytes: float
    gap: float
    top: int
    deadline_s: float | None


def search_part(part: Part, known: KnownStep, should_stop: Callable[[], bool]) -> PlanOutcome:
    """Return the outcome of a part's search; infeasible means: nothing below what the others have found."""
    problem = Problem(part.profile, part.cluster, part.job, part.num_devices, part.only_counts, part.most_bytes)
    limits = Limits(gap=part.gap, deadline_s=part.deadline_s, top=part.top, should_stop=should_stop, known=known)
    limits = Limits(**(vars(limits) | {"started_s": limits.clock()}))
    return solve(problem, limits)
