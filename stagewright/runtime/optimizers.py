"""Optimizers by the job's name, one for each stage on a rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument
from stagewright.runtime.training import TrainingSettings


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer and its numbers; `name` as in `TrainingJob.optimizer`."""

    name: str
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 0.0


def training_choice(plan: Plan, training: TrainingSettings) -> OptimizerChoice:
    """Return the optimizer of the plan's job with the settings' numbers; a custom one trains as AdamW."""
    name = plan.job.optimizer.name
    return OptimizerChoice(
        "adamw" if name == "custom" else name, training.learning_rate, training.momentum, training.weight_decay
    )


def make_optimizer(choice: OptimizerChoice, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer; raises InvalidArgument for a name that has none."""
    wanted = list(parameters)
    if choice.name == "adamw":
        return torch.optim.AdamW(wanted, lr=choice.learning_rate, weight_decay=choice.weight_decay)
    if choice.name == "adam":
        return torch.optim.Adam(wanted, lr=choice.learning_rate, weight_decay=choice.weight_decay)
    if choice.name in ("sgd", "sgd-momentum"):
        momentum = choice.momentum if choice.name == "sgd-momentum" else 0.0
        return torch.optim.SGD(wanted, lr=choice.learning_rate, momentum=momentum, weight_decay=choice.weight_decay)
    raise InvalidArgument(
        f"there is no optimizer {choice.name!r}", field="job.optimizer.name", hint="adamw, adam, sgd or sgd-momentum"
    )
