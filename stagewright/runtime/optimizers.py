"""Optimizers by the job's name, one for each stage on a rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from stagewright.planner.cost.matrix_optimizer import MATRIX_OPTIMIZERS
from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument
from stagewright.runtime.matrix_layout import LayoutOf, whole_layouts
from stagewright.runtime.muon import Muon
from stagewright.runtime.shampoo import Shampoo
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


def check_choice(plan: Plan) -> OptimizerChoice:
    """Return what weights are compared under: SGD with momentum, in fp64 the plan's own optimizer where it needs whole matrices.

    The former is large enough that three steps move every weight well clear of the rounding of its own size; the latter
    magnifies roundings of fp32 beyond what the comparison allows.
    """
    name = plan.job.optimizer.name
    if name in MATRIX_OPTIMIZERS and plan.job.precision == "fp64":
        return OptimizerChoice(name, 0.02)
    return OptimizerChoice("sgd-momentum", 0.5)


def scale_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate to this multiple of the one that the optimizer was made with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def make_optimizer(
    choice: OptimizerChoice, parameters: Iterable[nn.Parameter], layout_of: LayoutOf | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer; raises InvalidArgument for a name that has none.

    `layout_of` tells the tensors in each parameter, for optimizers that need whole matrices; without it all are elementwise.
    """
    wanted = list(parameters)
    layout_of = layout_of or whole_layouts(())
    if choice.name in MATRIX_OPTIMIZERS:
        kind = Muon if choice.name == "muon" else Shampoo
        return kind(
            [(value, layout_of(value)) for value in wanted],
            learning_rate=choice.learning_rate,
            momentum=choice.momentum,
            weight_decay=choice.weight_decay,
        )
    if choice.name == "adamw":
        return torch.optim.AdamW(wanted, lr=choice.learning_rate, weight_decay=choice.weight_decay)
    if choice.name == "adam":
        return torch.optim.Adam(wanted, lr=choice.learning_rate, weight_decay=choice.weight_decay)
    if choice.name in ("sgd", "sgd-momentum"):
        momentum = choice.momentum if choice.name == "sgd-momentum" else 0.0
        return torch.optim.SGD(wanted, lr=choice.learning_rate, momentum=momentum, weight_decay=choice.weight_decay)
    raise InvalidArgument(
        f"there is no optimizer {choice.name!r}",
        field="job.optimizer.name",
        hint="adamw, adam, sgd, sgd-momentum, muon or shampoo",
    )
