"""Device placement by learned search (Mirhoseini et al., ICML 2017; Spotlight, Gao et al., ICML 2018), as annealing.

Both learn a policy that proposes placements and is rewarded by the measured step. What is compared here is the search,
not the network: simulated annealing over the same plans, rewarded by the simulated step, beta growing a hundredfold over
each walk (`flexflow.Chain`). Deterministic by seed; proves nothing; better
than a single device, never better than the exact planner.
"""

from __future__ import annotations

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.planners.flexflow import walk_candidates
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import candidates_outcome
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem

COOLING = 100.0


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the best plan of the annealed walks."""
    choices = walk_candidates(problem, limits, seed=1, num_starts=3, cool=COOLING)
    return candidates_outcome(problem, limits, choices, PLANNER.name)


PLANNER = NamedPlanner(
    "device-placement",
    "Mirhoseini et al., Device Placement Optimization with Reinforcement Learning, ICML 2017",
    solve,
    objective="simulated step time",
    aliases=("spotlight", "annealing"),
)
