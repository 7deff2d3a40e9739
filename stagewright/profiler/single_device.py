"""What the profile alone says of training on one device: the sum of its layers, nothing fitted.

    step = n (sum over layers of F + I + W  +  2 overheads of an action - entrance) + sum of optimizer steps
           + overhead of a step
    peak = parameters + gradients and states of those that are used + max over layers (kept by it and the layers before it + its workspace)

for n microbatches that run one after another; nothing enters the model in the middle. It is the check of the profile: planner and simulator are not involved.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from stagewright.planner.documents import ConfigurationCost, ModelProfile, Recompute
from stagewright.planner.errors import InvalidArgument


@dataclass(frozen=True)
class SingleDevice:
    """Predicted seconds of a step and bytes at its peak."""

    step_s: float
    peak_bytes: float


def predict_single_device(
    profile: ModelProfile,
    configuration: tuple[int, int, int],
    *,
    num_microbatches: int,
    parameter_bytes: float,
    state_bytes: float,
) -> SingleDevice:
    """Return the prediction for a measured configuration.

    Parameters
    ----------
    configuration : (microbatch, sequence length, tensor degree).
    parameter_bytes : bytes of one parameter, and of its gradient.
    state_bytes : bytes of optimizer states for each parameter.

    Raises
    ------
    InvalidArgument : when the profile has not measured the configuration.
    """
    costs = [_cost(profile, name, configuration) for name in profile.layer_classes]
    microbatch_s = sum(cost.forward_s + cost.input_grad_s + cost.weight_grad_s for cost in costs)
    tied_s = sum(
        _optimizer_share(profile, costs, layer, tie.num_parameters) for tie in profile.tied for layer in tie.layers[1:]
    )
    optimizer_s = sum(cost.optimizer_s for cost in costs) - tied_s
    microbatch_s += 2 * profile.action_overhead_s - profile.entrance_s
    step_s = num_microbatches * microbatch_s + optimizer_s + profile.step_overhead_s
    kept = accumulate(cost.activation_bytes[Recompute.NONE] for cost in costs)
    highest = max(before + cost.workspace_bytes for before, cost in zip(kept, costs, strict=True))
    unused = sum(profile.classes[name].unused_parameters for name in profile.layer_classes)
    used = profile.num_parameters - unused
    static = profile.num_parameters * parameter_bytes + used * (parameter_bytes + state_bytes)
    return SingleDevice(step_s, static + highest)


def _cost(profile: ModelProfile, name: str, configuration: tuple[int, int, int]) -> ConfigurationCost:
    for cost in profile.classes[name].costs:
        if cost.key == configuration:
            return cost
    known = ", ".join(str(cost.key) for cost in profile.classes[name].costs)
    raise InvalidArgument(
        f"{name} was not measured at (microbatch, sequence, tensor degree) {configuration}",
        field="configuration",
        hint=f"measured: {known}",
    )


def _optimizer_share(profile: ModelProfile, costs: list[ConfigurationCost], layer: str, num_parameters: int) -> float:
    """Return the part of a layer's optimizer step that is a tied parameter's, which is stepped once only."""
    index = profile.layer_names.index(layer)
    total = profile.classes[profile.layer_classes[index]].parameters
    return costs[index].optimizer_s * num_parameters / total if total else 0.0
