"""Bytes on one device, by item: states by ZeRO stage, activations, logits, workspace, buffers.

With Psi parameters on a device before sharding, n data-parallel members and K bytes of optimizer state a parameter
(mixed-precision Adam: K = 12, parameters and gradients 2 bytes each; Rajbhandari et al., SC 2020):

    stage 0   (2 + 2 + K) Psi        stage 1   (2 + 2) Psi + K Psi / n
    stage 2   2 Psi + (2 + K) Psi/n  stage 3   (2 + 2 + K) Psi / n

Routed experts are replicated over fewer devices than the rest: their n is the expert data-parallel degree. Hybrid
sharding (HSDP, MiCS) divides by the shard group and not by n.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from stagewright.planner.documents.job import MASTER_BYTES, Optimizer
from stagewright.planner.documents.plan import Degrees, MemoryItems


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes of one parameter by class of state."""

    parameter: float
    gradient: float
    master: float
    moments: float

    @classmethod
    def of(cls, optimizer: Optimizer) -> ParameterBytes:
        """Return the classes of an optimizer; master weights exist where parameters are narrower than 4 bytes."""
        master = min(MASTER_BYTES, optimizer.state_bytes) if optimizer.has_masters else 0.0
        return cls(optimizer.parameter_bytes, optimizer.gradient_bytes, master, optimizer.state_bytes - master)


@dataclass(frozen=True)
class StateBytes:
    """States of one device, bytes."""

    parameters: float
    gradients: float
    master_weights: float
    optimizer: float

    @property
    def total(self) -> float:
        """Sum of all, bytes."""
        return self.parameters + self.gradients + self.master_weights + self.optimizer

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def items(self) -> MemoryItems:
        """Return them as plan items, where master weights belong to the optimizer."""
        return MemoryItems(
            parameters=self.parameters, gradients=self.gradients, optimizer=self.optimizer + self.master_weights
        )


def state_bytes(num_parameters: float, *, zero: int, num_shards: float, sizes: ParameterBytes) -> StateBytes:
    """Return the states of `num_parameters` on one device under a ZeRO stage with `num_shards` members."""
    n = num_shards
    return StateBytes(
        parameters=num_parameters * sizes.parameter / (n if zero >= 3 else 1),
        gradients=num_parameters * sizes.gradient / (n if zero >= 2 else 1),
        master_weights=num_parameters * sizes.master / (n if zero >= 1 else 1),
        optimizer=num_parameters * sizes.moments / (n if zero >= 1 else 1),
    )


def dense_shards(degrees: Degrees) -> int:
    """Return over how many devices the states of dense layers may be sharded: replicas of the weights, dp * cp."""
    return degrees.dp * degrees.cp


def expert_shards(degrees: Degrees) -> int:
    """Return over how many devices the states of routed experts may be sharded: the expert data-parallel degree.

    That is the devices of the pipeline rank over ep * etp. Experts that nothing divides are sharded with the rest of their layer.
    """
    divided = degrees.expert_split
    return dense_shards(degrees) if divided == 1 else degrees.num_devices // divided


def device_state_bytes(
    dense_parameters: float,
    expert_parameters: float,
    degrees: Degrees,
    optimizer: Optimizer,
    *,
    shard_size: int | None = None,
) -> StateBytes:
    """Return the states of a device that holds so many parameters before ZeRO; `shard_size` limits the shard group."""
    sizes = ParameterBytes.of(optimizer)
    dense_n, expert_n = dense_shards(degrees), expert_shards(degrees)
    if shard_size is not None:
        dense_n, expert_n = min(dense_n, shard_size), min(expert_n, shard_size)
    dense = state_bytes(dense_parameters, zero=degrees.zero, num_shards=dense_n, sizes=sizes)
    expert = state_bytes(expert_parameters, zero=degrees.zero, num_shards=expert_n, sizes=sizes)
    return dense + expert


def state_divisors(degrees: Degrees, shard_size: int | None = None) -> tuple[int, int]:
    """Return what ZeRO divides the optimizer step of (dense, expert) parameters by; 1 without ZeRO."""
    if degrees.zero == 0:
        return 1, 1
    dense_n, expert_n = dense_shards(degrees), expert_shards(degrees)
    if shard_size is None:
        return dense_n, expert_n
    return min(dense_n, shard_size), min(expert_n, shard_size)
