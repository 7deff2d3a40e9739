"""Weights predicted some updates ahead, or corrected for the updates since: SpecTrain, XPipe, PipeMare.

Each predictor writes, for one stage, the values that a forward and a backward see, from the newest weights and what the
optimizer remembers, with as few passes over memory as the formula takes (`planner.simulation.version_copies` counts them). The formulas are those of `planner.schedules.weight_prediction`, the numbers of updates those of
the schedules' own modules.

    momentum      w - s lr v, v the velocity of SGD with momentum; for each microbatch
    adam          w - s lr m_hat / (sqrt(v_hat) + eps); once for the forwards and once for the backwards of an update
    discrepancy   forward on w; backward on w - (tau_fwd - tau_bkwd) delta, delta a decaying average of the changes of w;
                  the learning rate is divided by tau_fwd^p, p annealed to 0

Before an optimizer has any memory the newest weights are the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules import pipemare, spectrain, xpipe
from stagewright.planner.schedules.schedule import Schedule

Optimizer = torch.optim.Optimizer

DECAY_OVER_DELAY = 0.135  # what is left of a change in PipeMare's average after the delay


class Predictor(Protocol):
    """One stage's predictor.

    `remembers` says whether it is told what the weights were before a step; `averages` are what it changes in place at each.
    """

    remembers: ClassVar[bool]
    averages: Sequence[Tensor]

    def write(
        self,
        seen: Sequence[Tensor],
        newest: Sequence[Tensor],
        optimizer: Optimizer | None,
        *,
        is_first: bool,
        backward: bool,
    ) -> None:
        """Set `seen` to what a forward or backward sees; `is_first` for the first microbatch of an update."""
        ...

    def before_step(self, optimizer: Optimizer | None, step: int) -> None:
        """Prepare the optimizer for its step, counted from 0."""
        ...

    def after_step(self, before: Sequence[Tensor], newest: Sequence[Tensor]) -> None:
        """Take note of a change of the weights; `before` may be overwritten."""
        ...


@dataclass
class MomentumPredictor:
    """SpecTrain's: `forward_steps` and `backward_steps` updates along the velocity."""

    remembers: ClassVar[bool] = False
    averages: ClassVar[Sequence[Tensor]] = ()
    forward_steps: int
    backward_steps: int

    def write(
        self,
        seen: Sequence[Tensor],
        newest: Sequence[Tensor],
        optimizer: Optimizer | None,
        *,
        is_first: bool,
        backward: bool,
    ) -> None:
        """Set them to the newest weights moved along the velocity."""
        steps = self.backward_steps if backward else self.forward_steps
        for target, value in zip(seen, newest, strict=True):
            velocity = _state(value, optimizer).get("momentum_buffer")
            if velocity is None or optimizer is None or steps == 0:
                target.copy_(value)
            else:
                torch.add(value, velocity, alpha=-steps * optimizer.param_groups[0]["lr"], out=target)

    def before_step(self, optimizer: Optimizer | None, step: int) -> None:
        """Do nothing."""

    def after_step(self, before: Sequence[Tensor], newest: Sequence[Tensor]) -> None:
        """Do nothing."""


@dataclass
class AdamPredictor:
    """XPipe's: the first microbatch of an update predicts for all of them, which no other update's come between."""

    remembers: ClassVar[bool] = False
    averages: ClassVar[Sequence[Tensor]] = ()
    forward_steps: int
    backward_steps: int
    _made: dict[bool, list[Tensor]] = field(default_factory=dict)  # for forwards and for backwards

    def write(
        self,
        seen: Sequence[Tensor],
        newest: Sequence[Tensor],
        optimizer: Optimizer | None,
        *,
        is_first: bool,
        backward: bool,
    ) -> None:
        """Set them to the prediction of the update's first microbatch."""
        if is_first:
            steps = self.backward_steps if backward else self.forward_steps
            self._made.pop(backward, None)
            self._made[backward] = [_along_adam(value, optimizer, steps) for value in newest]
        for target, value in zip(seen, self._made[backward], strict=True):
            target.copy_(value)

    def before_step(self, optimizer: Optimizer | None, step: int) -> None:
        """Do nothing."""

    def after_step(self, before: Sequence[Tensor], newest: Sequence[Tensor]) -> None:
        """Do nothing."""


@dataclass
class DiscrepancyCorrection:
    """PipeMare's: `delay` updates lie between a forward and its backward.

    `annealing_steps` is how long the learning rate is held back; 0 never does.
    """

    remembers: ClassVar[bool] = True
    delay: float
    annealing_steps: int = 0
    averages: list[Tensor] = field(default_factory=list)
    _rates: list[float] = field(default_factory=list)

    def write(
        self,
        seen: Sequence[Tensor],
        newest: Sequence[Tensor],
        optimizer: Optimizer | None,
        *,
        is_first: bool,
        backward: bool,
    ) -> None:
        """Set them to the newest weights, for a backward moved back to about where they were at the forward."""
        if not backward or not self.averages:
            for target, value in zip(seen, newest, strict=True):
                target.copy_(value)
            return
        for target, value, change in zip(seen, newest, self.averages, strict=True):
            torch.add(value, change, alpha=-self.delay, out=target)

    def before_step(self, optimizer: Optimizer | None, step: int) -> None:
        """Set the learning rate of the step."""
        if optimizer is None or not self.annealing_steps:
            return
        self._rates = self._rates or [group["lr"] for group in optimizer.param_groups]
        factor = pipemare.learning_rate_factor(self.delay, step, self.annealing_steps)
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def after_step(self, before: Sequence[Tensor], newest: Sequence[Tensor]) -> None:
        """Add the change to the average."""
        decay = DECAY_OVER_DELAY ** (1.0 / self.delay)
        if not self.averages:
            self.averages = [torch.zeros_like(old) for old in before]
        for average, value, old in zip(self.averages, newest, before, strict=True):
            average.lerp_(torch.sub(value, old, out=old), 1.0 - decay)


def predictor_of(schedule: Schedule, stage: int) -> Predictor:
    """Return the predictor that a schedule names for a stage; raises InvalidArgument for none that is known."""
    name, count = str(schedule.parameters.get("predictor", "")), schedule.num_stages
    every = int(schedule.parameters.get("update_every", 1))
    if name == "momentum":
        forward, backward = (spectrain.version_difference(stage, count, backward=way) for way in (False, True))
        return MomentumPredictor(forward, backward)
    if name == "adam":
        forward, backward = (xpipe.version_difference(stage, count, every, backward=way) for way in (False, True))
        return AdamPredictor(forward, backward)
    if name == "discrepancy":
        annealing = int(schedule.parameters.get("annealing_steps", 0))
        return DiscrepancyCorrection(pipemare.forward_delay(stage, count, every), annealing)
    raise InvalidArgument(
        f"there is no weight predictor {name!r}",
        field="schedule.parameters.predictor",
        hint="momentum, adam or discrepancy",
    )


def _state(parameter: Tensor, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Return what the optimizer remembers of a parameter; nothing before its first step."""
    return {} if optimizer is None else optimizer.state.get(parameter, {})


def _along_adam(parameter: Tensor, optimizer: Optimizer | None, steps: int) -> Tensor:
    """Return a new tensor: the parameter `steps` updates along Adam's direction."""
    found = _state(parameter, optimizer)
    if optimizer is None or "exp_avg" not in found or steps == 0:
        return parameter.clone()
    group, step = optimizer.param_groups[0], float(found["step"])
    first, second = (1.0 - beta**step for beta in group["betas"])
    root = (found["exp_avg_sq"] / second).sqrt_().add_(group["eps"])
    return torch.addcdiv(parameter, found["exp_avg"], root, value=-steps * group["lr"] / first)
