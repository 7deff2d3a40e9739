"""The runtime makes as many passes over a stage's weights as the planner prices, counted operation by operation."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import WeightPolicy
from stagewright.planner.simulation.version_copies import version_copies
from stagewright.runtime.optimizers import OptimizerChoice, make_optimizer
from stagewright.runtime.predicted_weights import predictor_of
from stagewright.runtime.weight_versions import VersionedBucket, VersionRule

WIDTH, UPDATES, EVERY = 16, 4, 4
PASSES_OF_A_COPY = 3
ZEROS = 2  # passes that the planner takes off each update, since gradients are dropped


class Passes(TorchDispatchMode):
    """Counts tensors of the weights' size: each once read, once written, and once more where it is written unread."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        result = function(*arguments, **keywords)
        name = str(function)
        if "detach" in name or "view" in name:
            return result
        read = {_place(value) for value in arguments[name.startswith("aten.copy_") :] if _is_whole(value)}
        written = {_place(value) for value in (result, keywords.get("out")) if _is_whole(value)}
        self.count += len(read) + len(written) + len(written - read)
        return result


def _is_whole(value):
    return isinstance(value, torch.Tensor) and value.numel() == WIDTH * WIDTH


def _place(value):
    return value.data_ptr()


def _measured(schedule, stage, optimizer):
    """Return copies of a forward's, a backward's and an update's weights, means over the last update's microbatches."""
    policy, told = schedule.weight_policy, schedule.parameters
    every = int(told.get("update_every", 1)) if policy is not WeightPolicy.ELASTIC else EVERY
    count = schedule.num_replicas if policy is WeightPolicy.ELASTIC else 1
    buckets = []
    for _ in range(count):
        model = nn.Linear(WIDTH, WIDTH, bias=False)
        predictor = predictor_of(schedule, stage) if policy is WeightPolicy.PREDICT else None
        delayed = int(policy in (WeightPolicy.DOUBLE_BUFFER, WeightPolicy.TWO_GROUP))
        rule = VersionRule(policy, every, delayed, predictor, elastic_rate=0.1)
        bucket = VersionedBucket(model, {"weight": model.weight}, frozenset({(0, stage)}), rule)
        bucket.optimizer = make_optimizer(optimizer, bucket.optimized())
        buckets.append(bucket)
    if count > 1:
        for bucket in buckets:
            bucket.siblings = tuple(buckets)
    found = {"forward": 0, "backward": 0, "update": 0}

    def counted(kind, work, *arguments):
        with Passes() as passes:
            work(*arguments)
        found[kind] += passes.count

    for update in range(UPDATES):
        found = dict.fromkeys(found, 0)
        for bucket in buckets:
            for microbatch in range(update * every, (update + 1) * every):
                counted("forward", bucket.before_forward, microbatch)
                loss = bucket.model(torch.randn(2, WIDTH)).sum()
                counted("backward", bucket.before_backward, microbatch)
                loss.backward()
            counted("update", bucket.before_step, (update + 1) * every - 1)
            bucket.optimizer.step()
            counted("update", bucket.after_step)
            bucket.clear()
    units = {"forward": every * count, "backward": every * count, "update": count}
    return {kind: passes / PASSES_OF_A_COPY / units[kind] for kind, passes in found.items()}


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("pipedream", "sgd-momentum"),
        ("2bw", "sgd-momentum"),
        ("ampnet", "sgd-momentum"),
        ("spectrain", "sgd-momentum"),
        ("xpipe", "adam"),
        ("pipemare", "sgd-momentum"),
        ("avgpipe", "sgd-momentum"),
    ],
)
def test_the_planner_counts_the_passes_that_the_runtime_makes(name, optimizer, stage):
    schedule = generate(name, ScheduleRequest(2, EVERY))
    expected = version_copies(schedule)
    measured = _measured(schedule, stage, OptimizerChoice(optimizer, 0.01))
    assert measured["forward"] == pytest.approx(expected.forward[stage])
    assert measured["backward"] == pytest.approx(expected.backward[stage])
    assert measured["update"] == pytest.approx(expected.update[stage] + ZEROS / PASSES_OF_A_COPY)
