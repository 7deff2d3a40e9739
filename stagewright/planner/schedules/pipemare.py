"""PipeMare: no stashing at all; the learning rate and a discrepancy correction make up for the delay.

With D stages and T microbatches in a minibatch the forward of stage i (from 1) uses weights tau minibatches old,

    tau_fwd(i) = (2 (D - i) + 1) / T,      tau_bkwd = 0.

T1 divides the learning rate by tau^p, with p annealed to 0; T2 corrects the backward's weights,
u = w - (tau_fwd - tau_bkwd) delta with delta an average of weight changes; T3 starts with synchronous steps.
The order is 1F1B without a flush; memory is one copy of the weights and one of delta.

Paper: Yang et al., PipeMare: Asynchronous Pipeline Parallel DNN Training, MLSys 2021.
"""

from __future__ import annotations

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.pipedream import endless_1f1b
from stagewright.planner.schedules.pipedream_2bw import num_updates
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy


def pipemare(request: ScheduleRequest) -> Schedule:
    """Return `updates` minibatches (1 unless told) of T microbatches each."""
    updates = num_updates(request)
    parameters: dict[str, int | float | str] = {
        "predictor": "discrepancy",
        "updates": updates,
        "update_every": request.num_microbatches,
    }
    return endless_1f1b(request, "pipemare", WeightPolicy.PREDICT, parameters, num_periods=updates)


def forward_delay(stage: int, num_stages: int, num_microbatches: int) -> float:
    """Return tau_fwd of a stage (from 0), in minibatches."""
    return (2 * (num_stages - stage - 1) + 1) / num_microbatches


def learning_rate_factor(delay: float, step: int, num_annealing_steps: int) -> float:
    """Return T1's factor on the learning rate, tau^-p with p = 1 - min(step / annealing steps, 1); at most 1."""
    power = 1.0 - min(step / num_annealing_steps, 1.0)
    return float(min(1.0, delay**-power))


FAMILY = ScheduleFamily(
    "pipemare",
    "Yang et al., PipeMare: Asynchronous Pipeline Parallel DNN Training, MLSys 2021",
    pipemare,
    synchronous=False,
    weight_policy=WeightPolicy.PREDICT,
)
