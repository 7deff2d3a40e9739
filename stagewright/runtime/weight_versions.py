"""Weights that change under microbatches on their way: PipeDream's stashing, 2BW's double buffer, AMPNet's none.

The optimizer steps on a master copy. What the modules hold are versions of it:

    stash   an update makes new parameters; a microbatch's graph keeps those of its forward, and its gradient is theirs
    none    an update replaces the data of the parameters; a backward sees whatever is there
    2bw     the parameters are the master of one update ago: W(t + 1) = W(t) - v grad f(W(t - 1))

A version lives as long as a graph refers to it. Replicas and weights that stages share would need reductions at each
update, which no order holds: they are refused.

Papers: Narayanan et al., PipeDream, SOSP 2019, and Memory-Efficient Pipeline-Parallel DNN Training, ICML 2021; Gaunt et
al., AMPNet, 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.schedule import WeightPolicy
from stagewright.runtime.reduction import StageKey

POLICIES = (WeightPolicy.STASH, WeightPolicy.NONE, WeightPolicy.DOUBLE_BUFFER)


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

    def install(self, value: Tensor) -> None:
        """Let the modules hold a new version."""
        made = nn.Parameter(value)
        for module, attribute in self.places:
            module._parameters[attribute] = made


class VersionedBucket:
    """A stage's parameters under a weight policy."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        holders: frozenset[StageKey],
        policy: WeightPolicy,
    ) -> None:
        if policy not in POLICIES:
            raise InvalidArgument(
                f"the runtime does not execute the weight policy {policy.value!r}",
                field="schedule.name",
                hint="take pipedream, 2bw or ampnet, or a synchronous schedule",
            )
        self.holders = holders
        self._policy = policy
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for attribute, value in module._parameters.items():
                if value is not None:
                    places.setdefault(id(value), []).append((module, attribute))
        self._slots = [
            _Slot(name, nn.Parameter(value.detach().clone()), tuple(places[id(value)]))
            for name, value in parameters.items()
            if value.requires_grad
        ]
        self._used: dict[int, list[nn.Parameter]] = {}
        self._previous: list[Tensor] = []

    def before_forward(self, microbatch: int) -> None:
        """Remember the versions that a microbatch's forward uses."""
        self._used[microbatch] = [slot.current for slot in self._slots]

    def before_step(self, microbatch: int) -> None:
        """Hand a microbatch's gradient, or that of all since the last update, to the master."""
        versions = self._used.pop(microbatch) if microbatch >= 0 else [slot.current for slot in self._slots]
        self._previous = [slot.master.detach().clone() for slot in self._slots]
        for slot, version in zip(self._slots, versions, strict=True):
            slot.master.grad, version.grad = version.grad, None

    def after_step(self) -> None:
        """Bring the stepped master, or the one before, to the modules."""
        for slot, previous in zip(self._slots, self._previous, strict=True):
            slot.master.grad = None
            if self._policy is WeightPolicy.STASH:
                slot.install(slot.master.detach().clone())
            elif self._policy is WeightPolicy.NONE:
                slot.current.data = slot.master.detach().clone()
            else:
                slot.install(previous)

    def arm(self) -> None:
        """Do nothing: there are no replicas."""

    def start(self) -> None:
        """Do nothing: there are no replicas."""

    def finish(self) -> None:
        """Do nothing: there are no replicas."""

    def after_microbatch(self) -> None:
        """Do nothing: there are no replicas."""

    def unshard(self) -> None:
        """Do nothing: parameters are whole."""

    def reshard(self) -> None:
        """Do nothing: parameters stay whole."""

    def optimized(self) -> list[nn.Parameter]:
        """Return the masters."""
        return [slot.master for slot in self._slots]

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
        """Return copies of the masters by name."""
        return {slot.name: slot.master.detach().clone() for slot in self._slots}

    def held_gradient_bytes(self) -> float:
        """Return the bytes of one version's gradients."""
        return float(sum(slot.master.numel() * slot.master.element_size() for slot in self._slots))

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set masters and versions."""
        for slot in self._slots:
            slot.master.data.copy_(values[slot.name])
            slot.install(values[slot.name].clone())

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
            optimizer.state[slot.master] = {key: found[slot.name].clone() for key, found in values.items()}

    def clear(self) -> None:
        """Forget the gradients of the current versions."""
        for slot in self._slots:
            slot.current.grad = None
