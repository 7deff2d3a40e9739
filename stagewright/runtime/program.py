"""The lowered schedule of a plan: what the ranks execute. Without torch, so that the launcher can name actions."""

from __future__ import annotations

from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.prediction import Evaluation, evaluate
from stagewright.planner.schedules.lowering import lower
from stagewright.planner.schedules.schedule import Schedule, step_text
from stagewright.planner.simulation.nccl import check_nccl


def program_of(plan: Plan, profile: ModelProfile) -> tuple[Schedule, Evaluation]:
    """Return the plan's lowered schedule, checked under NCCL's rules, and the evaluation it was timed with.

    The ranks execute the order that was evaluated: a merge of I and W would change what a rank holds at its peak.
    """
    evaluation = evaluate(plan, profile)
    zero = max(stage.degrees.zero for stage in plan.stages)
    schedule = lower(evaluation.schedule, evaluation.costs, data_parallel=True, zero=zero, merge="none")
    check_nccl(schedule)
    return schedule, evaluation


def describe_action(plan: Plan, schedule: Schedule, rank: int, step: int, position: int) -> str:
    """Return where a rank is in words: its stage, its action and the step."""
    if position < 0:
        return ""
    pipeline_rank = next(i for i, ranks in enumerate(plan.mapping.pipeline_ranks) if rank in ranks)
    steps = list(schedule.actions(pipeline_rank))
    if position >= len(steps):
        return f"after the last action of step {step}"
    return f"stage {steps[position][0].stage}, action {step_text(steps[position])} of step {step}"
