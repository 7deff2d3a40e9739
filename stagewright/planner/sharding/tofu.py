"""Tofu (Wang et al., EuroSys 2019): every tensor and every operator divided, by halving the devices again and again.

At each step the operators' partition-n-reduce strategies over two halves are chosen together, at least communication, with
what earlier steps chose settled; after log2 N steps every device holds 1/N of each parameter and does 1/N of each
operator's work. Tofu solves a step by dynamic programming over a coarsened chain; here the step is the integer programme
of `intra_operator` on one more mesh axis, which takes any graph. The paper proves the greedy recursion optimal for
uniform links, where an earlier step's exchange never costs a device less than a later one's.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.sharding.intra_operator import LayerProblem, LayerSharding, shard_layer
from stagewright.planner.sharding.layout import Mesh
from stagewright.planner.sharding.operator_graph import OperatorGraph


@dataclass(frozen=True)
class TofuAnswer:
    """The strategies over all halvings, and the bytes a device sends at each, outermost first."""

    sharding: LayerSharding
    step_bytes: tuple[float, ...]


def tofu(graph: OperatorGraph, num_devices: int) -> TofuAnswer:
    """Return the recursive division of a graph over devices.

    Raises
    ------
    InvalidArgument : when the devices are no power of two above 1.
    Infeasible : when some operator cannot be divided.
    """
    if num_devices < 2 or num_devices & (num_devices - 1):
        raise InvalidArgument(
            f"{num_devices} devices cannot be halved again and again",
            field="num_devices",
            hint="give a power of two from 2 on",
        )
    found: LayerSharding | None = None
    costs: list[float] = []
    for depth in range(1, num_devices.bit_length()):
        problem = LayerProblem(
            halvings(depth),
            graph,
            {},
            divides_everything=True,
            given=() if found is None else found.chosen,
            given_homes={} if found is None else found.homes,
        )
        found = shard_layer(problem)
        costs.append(found.cost)
    assert found is not None
    steps = [after - before for before, after in zip([0.0, *costs], costs, strict=False)]
    return TofuAnswer(found, tuple(steps))


def halvings(depth: int) -> Mesh:
    """Return the mesh of `depth` axes of two devices."""
    return Mesh(tuple(f"half{index}" for index in range(depth)), (2,) * depth)
