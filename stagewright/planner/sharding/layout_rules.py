"""Mesh-TensorFlow's layout rules (Shazeer et al., NeurIPS 2018): named dimensions mapped to mesh axes, once for a model."""

from __future__ import annotations

from collections.abc import Sequence

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.sharding.layout import Mesh, Placement, split
from stagewright.planner.sharding.operator_graph import OperatorGraph


def annotations_of(
    mesh: Mesh, graph: OperatorGraph, rules: Sequence[tuple[str, str]]
) -> dict[str, dict[str, Placement]]:
    """Return the placements that (dimension, axis) rules give every tensor of a graph.

    Raises
    ------
    InvalidArgument : when an axis would split two dimensions of one tensor, which Mesh-TensorFlow forbids.
    """
    found: dict[str, dict[str, Placement]] = {}
    for name, dims in graph.tensors.items():
        placements: dict[str, Placement] = {}
        for dim, axis in rules:
            if dim not in dims:
                continue
            if axis in placements:
                raise InvalidArgument(
                    f"axis {axis} splits both {placements[axis].dim!r} and {dim!r} of tensor {name!r}",
                    field="rules",
                    hint="map the two dimensions to different axes",
                )
            placements[axis] = split(dim)
        found[name] = placements
    return found
