"""What one device of a pipeline rank sees: tokens, divisors of each axis, groups on the links.

Attention and expert layers use the same devices in different shapes (MoE Parallel Folding, Liu et al. 2025): dense layers
as tp x cp x dp, experts as etp x ep x (expert) dp, tp * cp * dp = etp * ep * edp. Axes vary in the given order, experts'
axes in the order etp, ep, edp over the same devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from stagewright.planner.cost.groups import DEFAULT_ORDER, AxisOrder, GroupShape, axis_stride, group_of_ranks
from stagewright.planner.documents.cluster import NodeGroup
from stagewright.planner.documents.plan import Axis, Degrees


@dataclass(frozen=True)
class RankGroups:
    """The groups of one pipeline rank's devices on the links of its node group."""

    degrees: Degrees
    group: NodeGroup
    order: AxisOrder = DEFAULT_ORDER
    num_pipeline_ranks: int = 1

    @cached_property
    def tp(self) -> GroupShape:
        return self._group([("tp", self.degrees.tp)])

    @cached_property
    def ulysses(self) -> GroupShape:
        """The inner part of the context group, which exchanges heads."""
        return self._group([("cp", self.degrees.ulysses)])

    @cached_property
    def ring(self) -> GroupShape:
        """The outer part of the context group, round which keys and values travel."""
        inner = self.degrees.ulysses
        return self._group([("cp", self.degrees.cp // inner)], spacing=inner)

    @cached_property
    def context(self) -> GroupShape:
        return self._group([("cp", self.degrees.cp)])

    @cached_property
    def replicas(self) -> GroupShape:
        """Devices that hold the same dense weights: dp x cp."""
        return self._group([("cp", self.degrees.cp), ("dp", self.degrees.dp)])

    @cached_property
    def etp(self) -> GroupShape:
        return self._regrouped(self.degrees.etp, 1)

    @cached_property
    def ep(self) -> GroupShape:
        return self._regrouped(self.degrees.ep, self.degrees.etp)

    @cached_property
    def expert_replicas(self) -> GroupShape:
        """Devices that hold the same experts."""
        inner = self.degrees.etp * self.degrees.ep
        return self._regrouped(self.degrees.num_devices // inner, inner)

    @cached_property
    def devices(self) -> tuple[int, ...]:
        """Devices of pipeline rank 0 in the order of the axes, fastest first."""
        return self._devices([(axis, self._sizes[axis]) for axis in self.order if axis != "pp"])

    @cached_property
    def _sizes(self) -> dict[Axis, int]:
        degrees = self.degrees
        return {"tp": degrees.tp, "cp": degrees.cp, "dp": degrees.dp, "pp": self.num_pipeline_ranks}

    def _devices(self, axes: Sequence[tuple[Axis, int]], spacing: int = 1) -> tuple[int, ...]:
        devices = [0]
        for axis, size in axes:
            stride = axis_stride(axis, self._sizes, self.order) * spacing
            devices = [device + index * stride for index in range(size) for device in devices]
        return tuple(devices)

    def _group(self, axes: Sequence[tuple[Axis, int]], spacing: int = 1) -> GroupShape:
        return group_of_ranks(self._devices(axes, spacing), self.group)

    def _regrouped(self, size: int, stride: int) -> GroupShape:
        return group_of_ranks(self.devices[: size * stride : stride], self.group)
