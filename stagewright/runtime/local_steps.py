"""Replicas that train on their own for H steps and then meet: DiLoCo.

    H inner steps    w_r <- inner optimizer on the mean loss of replica r's own samples, no gradient leaves the replica
    outer step       D = mean over r of (a - w_r),  v <- m v + D,  a <- a - e (D + m v),  w_r <- a for every r

with the anchor a, where all replicas last stood (outer SGD with Nesterov momentum m and rate e). Inner optimizers keep their
states. Weights cross once in H steps, 1 / H of data parallelism's traffic. Not the same as a synchronous step: with H = 1,
an inner SGD, m = 0 and e = 1 it is one step of data parallelism, else a method of its own.

A plan asks for it by `schedule.parameters`: `local_steps` (H), `outer_rate` (0.7) and `outer_momentum` (0.9).

Paper: Douillard et al., DiLoCo, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument
from stagewright.runtime.reduction import Bucket, Traffic, mean_over


@dataclass(frozen=True)
class OuterStep:
    """When replicas meet and what they do then.

    Parameters
    ----------
    every : H, inner steps between two outer ones.
    learning_rate, momentum : of the outer step.
    """

    every: int
    learning_rate: float = 0.7
    momentum: float = 0.9


def outer_step_of(plan: Plan) -> OuterStep | None:
    """Return the outer step that a plan asks for; None for a plan whose replicas meet at each step.

    Raises InvalidArgument for a plan whose replicas need each other inside a step.
    """
    told = plan.schedule.parameters
    if "local_steps" not in told:
        return None
    every = int(told["local_steps"])
    field = "schedule.parameters.local_steps"
    if every < 1:
        raise InvalidArgument(f"local_steps is {every}, it must be at least 1", field=field)
    degrees = plan.stages[0].degrees
    if degrees.expert_split > 1 or plan.schedule.num_replicas > 1:
        raise InvalidArgument(
            f"local_steps is {every} with ep {degrees.ep}, etp {degrees.etp} and {plan.schedule.num_replicas} model replicas in a pipeline, "
            "which meet at each step",
            field=field,
            hint="pin ep=1 and take a schedule of one direction",
        )
    return OuterStep(every, float(told.get("outer_rate", 0.7)), float(told.get("outer_momentum", 0.9)))


class LocalSteps:
    """The anchor of one rank's parameters, and the outer steps on it.

    Parameters
    ----------
    group : the ranks that hold the same part of the model in the other data-parallel replicas.
    """

    def __init__(self, rule: OuterStep, buckets: Sequence[Bucket], group: dist.ProcessGroup, traffic: Traffic) -> None:
        self._rule = rule
        self._buckets = buckets
        self._group = group
        self._traffic = traffic
        self._num_steps = 0
        self._anchors = [
            [nn.Parameter(value.detach().clone()) for value in bucket.optimized()] for bucket in self._buckets
        ]
        self._outer = torch.optim.SGD(
            [anchor for anchors in self._anchors for anchor in anchors],
            lr=rule.learning_rate,
            momentum=rule.momentum,
            nesterov=rule.momentum > 0,
        )

    def after_step(self) -> None:
        """Take note of an inner step; every H-th one ends with the outer step."""
        self._num_steps += 1
        if self._num_steps % self._rule.every:
            return
        for bucket, anchors in zip(self._buckets, self._anchors, strict=True):
            for value, anchor in zip(bucket.optimized(), anchors, strict=True):
                change = anchor.detach() - value.detach()
                anchor.grad = mean_over(change, self._group, self._traffic, "all-reduce/outer")
        self._outer.step()
        with torch.no_grad():
            for bucket, anchors in zip(self._buckets, self._anchors, strict=True):
                for value, anchor in zip(bucket.optimized(), anchors, strict=True):
                    value.copy_(anchor)
                bucket.after_step()
