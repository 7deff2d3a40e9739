"""Weights that change under microbatches on their way: which ones a forward and its backward see, by policy.

The optimizer steps on a master copy; what the modules hold are versions of it. Let k be the update that a microbatch
belongs to (each microbatch, or each `update_every` of them), and t the updates that a stage has made so far:

    stash    forward and backward on W(t) of the forward; a graph keeps the version it was made with   (PipeDream)
    2bw      forward and backward on W(k - 1)                                                          (PipeDream-2BW)
    2gw      stages of the first group on W(k - 1), those of the second on W(k), which is W(t)         (WPipe)
    none     forward on W(t), backward on whatever is there by then                                    (AMPNet)
    predict  one copy, moved in place before each forward and backward, see `predicted_weights`        (SpecTrain ...)
    elastic  each pipeline has weights of its own, drawn to their mean after its update                (AvgPipe)

2bw and 2gw hold the last two versions; a version lives on as long as a graph refers to it. Under stash a stage may have
several workers, each with minibatches of its own: at each update they average the gradients of one minibatch each. Other
replicas (but for elastic's own) and weights that stages share would need reductions that no order holds: they are refused.

Papers: Narayanan et al., PipeDream, SOSP 2019, and Memory-Efficient Pipeline-Parallel DNN Training, ICML 2021; Gaunt et
al., AMPNet, 2017; Yang et al., WPipe, ICLR 2022; Chen et al., AvgPipe, PPoPP 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.schedule import WeightPolicy
from stagewright.runtime.predicted_weights import Predictor
from stagewright.runtime.reduction import StageKey, Traffic, mean_over

DELAYED = (WeightPolicy.DOUBLE_BUFFER, WeightPolicy.TWO_GROUP)
IN_PLACE = (WeightPolicy.NONE, WeightPolicy.PREDICT)


@dataclass(frozen=True)
class VersionRule:
    """What a stage's versions follow.

    Parameters
    ----------
    policy : the schedule's.
    update_every : microbatches of one update.
    delay : updates that a forward's weights are behind its own, under 2bw and 2gw.
    predictor : what moves the weights, under predict.
    elastic_rate : share of the way to the mean of the pipelines, under elastic.
    """

    policy: WeightPolicy
    update_every: int = 1
    delay: int = 0
    predictor: Predictor | None = None
    elastic_rate: float = 0.0


@dataclass(frozen=True)
class _Slot:
    """One parameter: its name, its master, and every place in the modules that holds its current version."""

    name: str
    master: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def current(self) -> nn.Parameter:
        module, attribute = self.places[0]
        parameter = module._parameters[attribute]
        assert parameter is not None
        return parameter

    def install(self, version: nn.Parameter) -> None:
        """Let the modules hold a version."""
        for module, attribute in self.places:
            module._parameters[attribute] = version


@dataclass
class VersionedBucket:
    """A stage's parameters under a weight policy; with several pipelines, those of one of them."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    holders: frozenset[StageKey]
    rule: VersionRule
    optimizer: torch.optim.Optimizer | None = None
    siblings: tuple[VersionedBucket, ...] = ()
    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=dict)
    updates: int = 0
    _base: int = 0
    _versions: dict[int, list[nn.Parameter]] = field(default_factory=dict)
    _used: dict[int, list[nn.Parameter]] = field(default_factory=dict)
    _before: list[Tensor] = field(default_factory=list)  # masters as the step under way found them

    def __post_init__(self) -> None:
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for attribute, value in module._parameters.items():
                if value is not None:
                    places.setdefault(id(value), []).append((module, attribute))
        self._slots = [
            _Slot(name, nn.Parameter(value.detach().clone()), tuple(places[id(value)]))
            for name, value in self.parameters.items()
            if value.requires_grad
        ]
        self._versions = {0: self._copies()}

    def before_forward(self, microbatch: int) -> None:
        """Let the modules hold what a microbatch's forward sees."""
        if microbatch // self.rule.update_every == 0 and not self._used:
            self._base = self.updates
        update = self._base + microbatch // self.rule.update_every
        wanted = max(update - self.rule.delay, 0) if self.rule.policy in DELAYED else self.updates
        if self.rule.policy in IN_PLACE:
            wanted = 0
        self._used[microbatch] = self._versions[wanted]
        self._install(self._versions[wanted])
        self._predict(microbatch, backward=False)

    def before_backward(self, microbatch: int) -> None:
        """Let the modules hold what a microbatch's backward sees."""
        self._install(self._used[microbatch])
        self._predict(microbatch, backward=True)

    def before_step(self, microbatch: int) -> None:
        """Hand the gradients of the update's microbatches, each of its own version, to the master."""
        done = [index for index in self._used if microbatch < 0 or index // self._every <= microbatch // self._every]
        versions = {id(self._used[index]): self._used[index] for index in sorted(done)}
        for index in done:
            del self._used[index]
        for position, slot in enumerate(self._slots):
            slot.master.grad = None
            for version in versions.values():
                gradient, version[position].grad = version[position].grad, None
                if gradient is not None:
                    slot.master.grad = gradient if slot.master.grad is None else slot.master.grad + gradient
        if self.group is not None:
            self._average(self.group)
        if self.rule.predictor is not None:
            self.rule.predictor.before_step(self.optimizer, self.updates)
            if self.rule.predictor.remembers:
                self._before = [slot.master.detach().clone() for slot in self._slots]

    def _average(self, group: dist.ProcessGroup) -> None:
        """Make the masters' gradients the means of all workers' of the stage; where all of them are none or zero, none."""
        without = {id(slot) for slot in self._slots if slot.master.grad is None}
        for slot in self._slots:
            if slot.master.grad is None:
                slot.master.grad = torch.zeros_like(slot.master)
        flat = torch.cat([slot.master.grad.reshape(-1) for slot in self._slots if slot.master.grad is not None])
        means = mean_over(flat, group, self.traffic, "all-reduce/dp")
        parts = means.split([slot.master.numel() for slot in self._slots])
        for slot, part in zip(self._slots, parts, strict=True):
            slot.master.grad = None if id(slot) in without and not part.any() else part.view_as(slot.master)

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring the stepped master to the versions."""
        for slot in self._slots:
            slot.master.grad = None
        self.updates += 1
        if self.rule.predictor is not None:
            self.rule.predictor.after_step(self._before, self._masters)
            self._before = []
            return  # each forward and backward is given weights of its own
        if self.rule.policy in IN_PLACE:
            for parameter, master in zip(self._versions[0], self._masters, strict=True):
                parameter.data.copy_(master)
            return
        if self.siblings:
            if self is self.siblings[-1]:
                self._draw_together()
            return
        self._versions[self.updates] = self._copies()
        for index in [index for index in self._versions if index < self.updates - self.rule.delay]:
            del self._versions[index]

    @property
    def renewed(self) -> list[nn.Parameter]:
        """What the modules hold, where every update makes it anew; nothing where one copy is changed in place."""
        return [] if self.rule.policy in IN_PLACE else [slot.current for slot in self._slots]

    @property
    def averages(self) -> Sequence[Tensor]:
        """What a predictor keeps beside the weights and changes in place."""
        return () if self.rule.predictor is None else self.rule.predictor.averages

    @property
    def _masters(self) -> list[nn.Parameter]:
        return [slot.master for slot in self._slots]

    @property
    def _every(self) -> int:
        return self.rule.update_every

    def _draw_together(self) -> None:
        """Move the weights of all pipelines towards their mean, when the last of them has stepped."""
        for masters in zip(*(sibling._masters for sibling in self.siblings), strict=True):
            mean = masters[0].clone()
            for master in masters[1:]:
                mean.add_(master)
            mean.div_(len(masters))
            for master in masters:
                master.lerp_(mean, self.rule.elastic_rate)
        for sibling in self.siblings:
            sibling._versions = {sibling.updates: sibling._copies()}

    def _copies(self) -> list[nn.Parameter]:
        return [nn.Parameter(slot.master.detach().clone()) for slot in self._slots]

    def _install(self, version: list[nn.Parameter]) -> None:
        for slot, value in zip(self._slots, version, strict=True):
            slot.install(value)

    @torch.no_grad()
    def _predict(self, microbatch: int, *, backward: bool) -> None:
        predictor = self.rule.predictor
        if predictor is None:
            return
        is_first = microbatch % self.rule.update_every == 0
        seen = [parameter.data for parameter in self._versions[0]]  # a graph that holds the copy sees the new values
        predictor.write(seen, self._masters, self.optimizer, is_first=is_first, backward=backward)

    def start(self) -> None:
        """Do nothing: there are no replicas."""

    def finish(self) -> None:
        """Do nothing: there are no replicas."""

    def after_microbatch(self) -> None:
        """Do nothing: there are no replicas."""

    def arm(self) -> None:
        """Do nothing: there is nothing to reduce under the backward."""

    def unshard(self) -> None:
        """Do nothing: parameters are whole."""

    def reshard(self) -> None:
        """Do nothing: parameters stay whole."""

    def optimized(self) -> list[nn.Parameter]:
        """Return the masters."""
        return self._masters

    def squared_norm(self) -> Tensor:
        """Raise: weights that change one stage at a time have no gradient of the whole model to clip."""
        raise InvalidArgument("asynchronous schedules do not clip by the global norm", field="clip_norm")

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the current versions by name."""
        return {
            slot.name: torch.zeros_like(slot.master) if slot.current.grad is None else slot.current.grad
            for slot in self._slots
        }

    def values(self) -> dict[str, Tensor]:
        """Return copies of the masters by name; with several pipelines, their mean."""
        if not self.siblings:
            return {slot.name: slot.master.detach().clone() for slot in self._slots}
        together = zip(*(sibling._slots for sibling in self.siblings), strict=True)
        return {slots[0].name: torch.stack([slot.master.detach() for slot in slots]).mean(dim=0) for slots in together}

    def held_gradient_bytes(self) -> float:
        """Return the bytes of one version's gradients."""
        return float(sum(slot.master.numel() * slot.master.element_size() for slot in self._slots))

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set masters and versions."""
        for slot in self._slots:
            slot.master.data.copy_(values[slot.name])
        self.updates = self._base = 0
        self._used.clear()
        self._versions = {0: self._copies()}
        self._install(self._versions[0])

    def states(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        """Return copies of the optimizer's states by key and name."""
        result: dict[str, dict[str, Tensor]] = {}
        for slot in self._slots:
            for key, value in optimizer.state.get(slot.master, {}).items():
                if isinstance(value, Tensor):
                    result.setdefault(key, {})[slot.name] = value.clone()
        return result

    def load_states(self, optimizer: torch.optim.Optimizer, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the optimizer's states."""
        for slot in self._slots:
            state = {key: found[slot.name].clone() for key, found in values.items() if slot.name in found}
            if state:
                optimizer.state[slot.master] = state

    def clear(self) -> None:
        """Forget the gradients of all versions."""
        for version in self._versions.values():
            for parameter in version:
                parameter.grad = None
