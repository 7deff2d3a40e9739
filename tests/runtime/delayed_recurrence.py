"""Asynchronous training in one process: each policy's recurrence written down without stages, ranks or messages.

Every stage has a history of its weights, W(0), W(1), ...; the rank's list of actions says only how many updates stand
before each forward and backward. A microbatch's loss is computed on the weights of its forwards; then the values are
changed, in place, to those of its backwards, and the gradient is taken.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stagewright.modeling import split
from stagewright.planner.documents import Plan
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import Schedule
from stagewright.runtime.optimizers import OptimizerChoice, make_optimizer

Weights = dict[str, torch.Tensor]


class StageHistory:
    """One stage's weights after each update, and what a predictor would add to each."""

    def __init__(self, stage: int, schedule: Schedule, start: Weights, choice: OptimizerChoice) -> None:
        self.stage, self.schedule = stage, schedule
        self.masters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        self.stepper = make_optimizer(choice, self.masters.values())
        self.rate = choice.learning_rate
        zeros = {name: torch.zeros_like(value) for name, value in start.items()}
        self.weights: list[Weights] = [dict(start)]
        self.directions: list[Weights] = [zeros]
        self.averages: list[Weights] = [zeros]
        self.updates_before = {kind: _updates_before(schedule, stage, kind) for kind in (Kind.F, Kind.B)}
        self.workers = len(set(schedule.placement[:, stage].tolist()))
        self.round: list[Weights] = []

    def step(self, gradients: Weights, delay: float) -> None:
        for name, master in self.masters.items():
            master.grad = gradients[name].clone()
        self.stepper.step()
        new = {name: master.detach().clone() for name, master in self.masters.items()}
        decay = 0.135 ** (1.0 / delay)
        old = self.weights[-1]
        self.averages.append(
            {name: decay * value + (1 - decay) * (new[name] - old[name]) for name, value in self.averages[-1].items()}
        )
        self.weights.append(new)
        self.directions.append({name: self._direction(master) for name, master in self.masters.items()})

    def take(self, gradients: Weights) -> Weights | None:
        """Keep one minibatch's gradients; return the mean of one minibatch of each worker, when they are all there."""
        self.round.append({name: gradients[name].clone() for name in self.masters})
        if len(self.round) < self.workers:
            return None
        taken, self.round = self.round, []
        return {name: sum(each[name] for each in taken) / len(taken) for name in self.masters}

    def _direction(self, master: torch.nn.Parameter) -> torch.Tensor:
        state = self.stepper.state[master]
        if "exp_avg" not in state:
            return state.get("momentum_buffer", torch.zeros_like(master)).clone()
        t = float(state["step"])
        first, second = state["exp_avg"] / (1 - 0.9**t), state["exp_avg_sq"] / (1 - 0.999**t)
        return first / (second.sqrt() + 1e-8)

    def seen(self, kind: Kind, microbatch: int, base: int) -> Weights:
        """Return the weights that a forward or a backward of a microbatch sees; `base` updates came before the run."""
        policy, told, count = self.schedule.name, self.schedule.parameters, self.schedule.num_stages
        every = int(told.get("update_every", 1))
        update = base + microbatch // every
        now = base + self.updates_before[kind][microbatch]
        if policy == "2bw" or (policy == "wpipe" and self.stage < count // 2):
            return self.weights[max(update - 1, 0)]
        if policy == "wpipe":
            return self.weights[update]
        if policy == "pipedream":
            return self.weights[base + self.updates_before[Kind.F][microbatch]]
        if policy == "ampnet":
            return self.weights[now]
        backward = kind is Kind.B
        if policy == "spectrain":
            steps = self.stage // 2 + (0 if backward else count - self.stage - 1)
            return _moved(self.weights[now], self.directions[now], -steps * self.rate)
        if policy == "xpipe":
            now = base + self.updates_before[kind][microbatch // every * every]
            steps = 0 if backward else -(-(count - self.stage - 1) // every)
            return _moved(self.weights[now], self.directions[now], -steps * self.rate)
        assert policy == "pipemare"
        delay = (2 * (count - self.stage - 1) + 1) / every
        return _moved(self.weights[now], self.averages[now], -delay if backward else 0.0)


def delayed_changes(
    plan: Plan, schedule: Schedule, model: torch.nn.Module, batches: list, choice: OptimizerChoice, microbatch: int
) -> Weights:
    """Return how the weights change in as many runs of the schedule as there are batches."""
    chain = split(model)
    whole = chain.segment(0, chain.num_layers)
    parameters = dict(model.named_parameters())
    start = {name: value.detach().clone() for name, value in parameters.items()}
    names = [list(chain.segment_of(stage.layer_indices).named_parameters()) for stage in plan.stages]
    stages = [
        StageHistory(index, schedule, {name: start[name] for name in group}, choice)
        for index, group in enumerate(names)
    ]
    every = int(schedule.parameters.get("update_every", 1))
    for batch in batches:
        bases = [len(stage.weights) - 1 for stage in stages]
        for index in range(schedule.num_microbatches):
            for stage, base in zip(stages, bases, strict=True):
                _set(parameters, stage.seen(Kind.F, index, base))
            part = tuple(value[index * microbatch : (index + 1) * microbatch] for value in batch)
            (loss,) = whole.run(part)
            for stage, base in zip(stages, bases, strict=True):
                _set(parameters, stage.seen(Kind.B, index, base))
            (loss / every).backward()
            if index % every == every - 1:
                for stage in stages:
                    delay = (2 * (len(stages) - stage.stage - 1) + 1) / every
                    mean = stage.take({name: parameters[name].grad for name in stage.masters})
                    if mean is not None:
                        stage.step(mean, delay)
                model.zero_grad()
    return {name: stage.weights[-1][name] - start[name] for stage in stages for name in stage.masters}


def elastic_changes(
    schedule: Schedule, model: torch.nn.Module, batches: list, choice: OptimizerChoice, microbatch: int
) -> Weights:
    """Return how the mean of the pipelines' weights changes: each trains on its microbatches, then all are drawn together."""
    chain = split(model)
    whole = chain.segment(0, chain.num_layers)
    parameters = dict(model.named_parameters())
    start = {name: value.detach().clone() for name, value in parameters.items()}
    count, rate = schedule.num_replicas, float(schedule.parameters.get("elastic_rate", 0.1))
    pipelines = [{name: torch.nn.Parameter(value.clone()) for name, value in start.items()} for _ in range(count)]
    steppers = [make_optimizer(choice, pipeline.values()) for pipeline in pipelines]
    for batch in batches:
        for index, (pipeline, stepper) in enumerate(zip(pipelines, steppers, strict=True)):
            model.zero_grad()
            _set(parameters, pipeline)
            for unit in range(index, schedule.num_microbatches, count):
                part = tuple(value[unit * microbatch : (unit + 1) * microbatch] for value in batch)
                (loss,) = whole.run(part)
                (loss * count / schedule.num_microbatches).backward()
            for name, value in pipeline.items():
                value.grad = parameters[name].grad.clone()
            stepper.step()
        for name in start:
            mean = sum(pipeline[name].detach() for pipeline in pipelines) / count
            for pipeline in pipelines:
                pipeline[name].data -= rate * (pipeline[name].detach() - mean)
    return {name: sum(pipeline[name].detach() for pipeline in pipelines) / count - start[name] for name in start}


def _moved(weights: Weights, direction: Weights, steps: float) -> Weights:
    return {name: value + steps * direction[name] for name, value in weights.items()}


def _set(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        parameters[name].data.copy_(value.detach())


def _updates_before(schedule: Schedule, stage: int, wanted: Kind) -> dict[int, int]:
    """How many updates of the stage stand before each microbatch's forward (or backward) in the list of its rank."""
    result = {}
    for rank in set(schedule.placement[:, stage].tolist()):
        updates = 0
        for step in schedule.actions(rank):
            for action in step:
                if action.stage == stage and action.kind is Kind.OPT:
                    updates += 1
                if action.stage == stage and action.kind is wanted:
                    result[action.microbatch] = updates
    return result
