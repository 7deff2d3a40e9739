"""The bytes a run should send in one step: the plan's prediction, with tied weights as the runtime reduces them.

The prediction counts a tied weight in the data-parallel reduction of each stage that holds it. The runtime reduces it
once, over the ranks of all those stages: with m data- and context-parallel ranks a stage and n over all of them, a ring
all-reduce of S bytes sends 2 (n - 1) S in place of 2 (m - 1) S a stage; with ZeRO, a reduce-scatter and an all-gather.
"""

from __future__ import annotations

from stagewright.planner.documents.plan import Plan, Prediction
from stagewright.planner.documents.profile import ModelProfile


def expected_traffic(plan: Plan, profile: ModelProfile, prediction: Prediction) -> dict[str, float]:
    """Return bytes sent in one step by operation and group, over all ranks; names without bytes are left out."""
    expected = dict(prediction.link_bytes)
    position = {name: index for index, name in enumerate(profile.layer_names)}
    stage_of = {layer: index for index, stage in enumerate(plan.stages) for layer in stage.layer_indices}
    for tie in profile.tied:
        stages = [stage_of[position[name]] for name in tie.layers]
        degrees = plan.stages[min(stages)].degrees
        split = degrees.tp if degrees.vocab_parallel else 1
        num_bytes = tie.num_parameters / split * plan.job.optimizer.gradient_bytes * degrees.tp
        inside = degrees.dp * degrees.cp
        holders = {row[stage] for row in plan.schedule.placement for stage in stages}
        replicas = len(plan.schedule.placement)
        counted = len(tie.layers) * replicas * (inside - 1) * num_bytes
        is_shared = len(set(stages)) > 1
        needed = (len(holders) * inside - 1) * num_bytes
        _move(expected, "dp", degrees.zero, -counted + (0.0 if is_shared else needed))
        _move(expected, "tied", degrees.zero, needed if is_shared else 0.0)
    return {name: value for name, value in expected.items() if value > 0.5}


def _move(expected: dict[str, float], purpose: str, zero: int, num_bytes: float) -> None:
    """Add twice the bytes to the operation that a ZeRO stage uses; a reduce-scatter and an all-gather share them."""
    operations = ("reduce-scatter", "all-gather") if zero else ("all-reduce",)
    for operation in operations:
        name = f"{operation}/{purpose}"
        expected[name] = expected.get(name, 0.0) + 2 * num_bytes / len(operations)
