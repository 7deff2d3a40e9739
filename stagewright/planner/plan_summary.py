"""A plan's choice in one line, and as a runner-up."""

from __future__ import annotations

from stagewright.planner.documents.outcome import Alternative
from stagewright.planner.documents.plan import Plan


def plan_summary(plan: Plan) -> str:
    """Return a plan's degrees, microbatch and schedule in one line; what is trivial is left out."""
    degrees, spec = plan.stages[0].degrees, plan.schedule
    parts = [
        f"{name}={getattr(degrees, name)}" for name in ("dp", "tp", "cp", "ep", "etp") if getattr(degrees, name) > 1
    ]
    parts += [f"pp={spec.num_ranks}"] if spec.num_ranks > 1 else []
    parts += ["sp"] if degrees.sp else []
    parts += [f"zero={degrees.zero}"] if degrees.zero else []
    parts += [f"microbatch={spec.microbatch}", spec.name + (f" v={spec.num_chunks}" if spec.num_chunks > 1 else "")]
    return " ".join(parts)


def alternative_of(plan: Plan) -> Alternative:
    """Return a scored plan as a runner-up."""
    return Alternative(
        summary=plan_summary(plan),
        step_time_s=plan.prediction.step_time_s,
        peak_memory_bytes=max(plan.prediction.peak_memory_bytes),
        plan=plan,
    )
