"""Plans for a job whose phases train or run one model in turn, as post-training does: a plan for each phase, chosen together.

Reinforcement learning generates, scores and trains round after round on the same devices; each phase is fastest under
degrees of its own, and the weights are laid out anew between phases. With K plans offered for each of P phases, one round
costs

    sum over phases p of  repeats_p step_p(k_p)  +  sum over p of reshard(k_p, k_{p+1}),   p + 1 modulo P

where `reshard` is the busiest device's seconds for the parameters it lacks (`migration`). For a cycle the least total is a
shortest closed walk: for each plan of the first phase a dynamic programme over the others, O(P K^3), exact over the plans
offered, which are the best and the runners-up of a search for each phase. ReaL (Mei et al., 2024) and HybridFlow (Sheng
et al., EuroSys 2025) search the same choice by sampling and by enumeration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.migration import migration
from stagewright.planner.planning import make_plan

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Phase:
    """One phase of a round: the job it runs on the shared model, and how often.

    Parameters
    ----------
    profile : of the shared layers, with what this phase costs them (forward alone for generation, say).
    repeats : steps of this phase in a round.
    """

    name: str
    profile: ModelProfile
    job: TrainingJob
    repeats: int = 1


@dataclass(frozen=True, eq=False)
class RoundPlan:
    """The plans of a round, one a phase, with the seconds of each phase and of each change to the next one."""

    plans: tuple[Plan, ...]
    phase_s: tuple[float, ...]
    reshard_s: tuple[float, ...]

    @property
    def round_s(self) -> float:
        return sum(self.phase_s) + sum(self.reshard_s)


def plan_round(phases: Sequence[Phase], cluster: Cluster, *, top: int = 8, gap: float = 0.01) -> RoundPlan:
    """Return the plans of least seconds a round among the best `top` + 1 of each phase.

    Raises
    ------
    InvalidArgument : for no phase, or phases of different layers.
    Infeasible : when a phase has no plan.
    """
    if not phases:
        raise InvalidArgument("a round needs at least one phase", field="phases")
    if len({phase.profile.layer_digest for phase in phases}) != 1:
        raise InvalidArgument(
            "the phases' profiles have different layers, and plans of different layers exchange no weights",
            field="phases",
            hint="plan phases of another model in a round of their own",
        )
    offered = [_offered(phase, cluster, top, gap) for phase in phases]
    seconds = [
        np.array([phase.repeats * plan.prediction.step_time_s for plan in plans])
        for phase, plans in zip(phases, offered, strict=True)
    ]
    following = [*range(1, len(phases)), 0]
    changes = [
        np.array([[reshard_s(a, b, phases[index].profile) for b in offered[following[index]]] for a in plans])
        for index, plans in enumerate(offered)
    ]
    chosen = least_cycle(seconds, changes)
    return RoundPlan(
        tuple(plans[at] for plans, at in zip(offered, chosen, strict=True)),
        tuple(float(row[at]) for row, at in zip(seconds, chosen, strict=True)),
        tuple(float(changes[p][chosen[p], chosen[following[p]]]) for p in range(len(phases))),
    )


def least_cycle(costs: Sequence[Floats], changes: Sequence[Floats]) -> list[int]:
    """Return one choice a phase of least total: `costs[p]` [K_p], and `changes[p]` [K_p, K_{p+1}] into the next phase.

    The last phase is followed by the first one; a single phase changes into itself. Ties take the first choices.
    """
    best, chosen = np.inf, [0] * len(costs)
    for first in range(len(costs[0])):
        value = np.full(len(costs[0]), np.inf)
        value[first] = costs[0][first]
        back = []
        for cost, change in zip(costs[1:], changes[:-1], strict=True):
            through = value[:, None] + change
            back.append(np.argmin(through, axis=0))
            value = through.min(axis=0) + cost
        ends = value + changes[-1][:, first]
        last = int(np.argmin(ends))
        if ends[last] < best:
            best, walk = float(ends[last]), [last]
            for row in reversed(back):
                walk.append(int(row[walk[-1]]))
            chosen = walk[::-1]
    return chosen


def reshard_s(before: Plan, after: Plan, profile: ModelProfile) -> float:
    """Return the seconds in which the busiest device gets the parameters it lacks; optimizer states stay where they are."""
    return migration(_weights_alone(before), _weights_alone(after), profile).seconds


def _weights_alone(plan: Plan) -> Plan:
    optimizer = plan.job.optimizer.model_copy(update={"state_bytes": 0.0})
    return plan.model_copy(update={"job": plan.job.model_copy(update={"optimizer": optimizer})})


def _offered(phase: Phase, cluster: Cluster, top: int, gap: float) -> list[Plan]:
    outcome = make_plan(phase.profile, cluster, phase.job, top=top, gap=gap)
    if outcome.plan is None:
        raise Infeasible(
            f"phase {phase.name} has no plan on {cluster.num_devices} devices of {cluster.name}",
            field="phases",
            hint="ask `stagewright plan` for this phase alone, which says what is short",
        )
    return [outcome.plan, *(other.plan for other in outcome.alternatives)]
