"""From one layout of a tensor to another: the collectives it takes, the cheapest sequence, what a device sends.

One step changes one mesh axis of n devices. With M the bytes that the axis' group holds together (OneFlow's boxing table):

    split -> replicated     all-gather       (n-1)/n   M  sent by each device
    partial -> replicated   all-reduce     2 (n-1)/n   M
    partial -> split        reduce-scatter   (n-1)/n   M
    split -> another split  all-to-all       (n-1)/n^2 M
    replicated -> split, replicated -> partial, split -> partial: local, nothing is sent

A step on an axis may touch dimension d only while no later axis splits d, since earlier axes cut first; the search
(Dijkstra over the layouts of one tensor) gathers the later axis before where that is needed.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from stagewright.planner.cost.communication import Operation, collective_s
from stagewright.planner.cost.groups import GroupShape
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.sharding.layout import (
    PARTIAL,
    REPLICATED,
    Layout,
    Mesh,
    Placement,
    fits,
    num_shards,
    text,
)

StepKind = Literal["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "local"]


@dataclass(frozen=True)
class Step:
    """One change of one mesh axis.

    Parameters
    ----------
    axis : position of the axis in the mesh.
    before, after : its placements.
    kind : the collective; `local` sends nothing.
    group_bytes : bytes the axis' group holds together (M above).
    sent_bytes : bytes each device sends.
    """

    axis: int
    before: Placement
    after: Placement
    kind: StepKind
    group_bytes: float
    sent_bytes: float


Price = Callable[[Step], float]


def sent(step: Step) -> float:
    """Price a step by the bytes a device sends."""
    return step.sent_bytes


def seconds(groups: Mapping[int, GroupShape]) -> Price:
    """Return the price in seconds of a step's collective over its axis' group."""

    def price(step: Step) -> float:
        if step.kind == "local":
            return 0.0
        operation: Operation = step.kind
        group = groups[step.axis]
        payload = step.group_bytes / group.size if operation == "all-to-all" else step.group_bytes
        return collective_s(operation, payload, group)

    return price


def step_between(mesh: Mesh, layout: Layout, axis: int, after: Placement, size_bytes: float) -> Step:
    """Return the step that gives one axis another placement; `size_bytes` is the whole tensor."""
    before, n = layout[axis], mesh.sizes[axis]
    others = tuple(REPLICATED if index == axis else placement for index, placement in enumerate(layout))
    group_bytes = size_bytes / num_shards(mesh, others)
    kind: StepKind = "local"
    factor = 0.0
    if before.kind == "split" and after.kind == "replicated":
        kind, factor = "all-gather", (n - 1) / n
    elif before.kind == "partial" and after.kind == "replicated":
        kind, factor = "all-reduce", 2 * (n - 1) / n
    elif before.kind == "partial" and after.kind == "split":
        kind, factor = "reduce-scatter", (n - 1) / n
    elif before.kind == "split" and after.kind == "split" and before != after:
        kind, factor = "all-to-all", (n - 1) / n**2
    if n == 1:
        kind, factor = "local", 0.0
    return Step(axis, before, after, kind, group_bytes, factor * group_bytes)


def redistribute(
    mesh: Mesh,
    before: Layout,
    after: Layout,
    *,
    dims: tuple[str, ...],
    sizes: Mapping[str, int],
    size_bytes: float,
    price: Price = sent,
) -> tuple[Step, ...]:
    """Return the cheapest steps from one layout of a tensor to another, under a price of a step; ties take fewer steps.

    Raises
    ------
    InvalidArgument : when either layout does not divide the tensor.
    """
    for layout in (before, after):
        if not fits(mesh, layout, dims, sizes):
            shape = {dim: sizes[dim] for dim in dims}
            raise InvalidArgument(
                f"layout {text(layout)} does not divide a tensor of {shape} evenly",
                field="layout",
                hint="split a dimension that the tensor has and the axis divides",
            )
    pushed = itertools.count()
    queue: list[tuple[float, int, int, Layout, tuple[Step, ...]]] = [(0.0, 0, next(pushed), before, ())]
    done: set[Layout] = set()
    while queue:
        cost, length, _, layout, steps = heapq.heappop(queue)
        if layout == after:
            return steps
        if layout in done:
            continue
        done.add(layout)
        for axis in range(len(mesh.axes)):
            for placement in _reachable(layout, axis, after):
                following = (*layout[:axis], placement, *layout[axis + 1 :])
                if following in done or not fits(mesh, following, dims, sizes):
                    continue
                step = step_between(mesh, layout, axis, placement, size_bytes)
                heapq.heappush(queue, (cost + price(step), length + 1, next(pushed), following, (*steps, step)))
    raise AssertionError("every layout reaches every other through the replicated one")


def _reachable(layout: Layout, axis: int, after: Layout) -> list[Placement]:
    """Return what an axis may become in one step: replicated, or split as some axis must end."""
    later = {placement.dim for placement in layout[axis + 1 :] if placement.kind == "split"}
    if layout[axis].kind == "split" and layout[axis].dim in later:
        return []
    choices = [REPLICATED] if layout[axis].kind != "replicated" else []
    choices += [
        placement for placement in dict.fromkeys(after) if placement.kind == "split" and placement.dim not in later
    ]
    if after[axis] == PARTIAL:
        choices.append(PARTIAL)
    return [placement for placement in choices if placement != layout[axis]]
