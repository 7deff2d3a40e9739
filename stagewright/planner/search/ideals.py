"""Ideals (downward-closed sets) of a DAG: the states of every exact partition of a graph into contiguous stages.

An ideal holds every predecessor of its members; a stage is the difference of two nested ideals, so that stages form a
chain. There are n + 1 ideals in a chain of n nodes and up to 2^width in general: exact methods over ideals are for
graphs of small width (Tarnawski et al. 2020, Piper 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument

MAX_IDEALS = 200_000


@dataclass(frozen=True, eq=False)
class IdealLattice:
    """All ideals of a DAG, by growing size (ties by content), the empty one first and the whole graph last.

    Parameters
    ----------
    members : bool [num_ideals, num_nodes].
    frontier : bool [num_ideals, num_nodes], members with an edge to a node outside, or with no successor at all.
    """

    num_nodes: int
    members: npt.NDArray[np.bool_]
    frontier: npt.NDArray[np.bool_]

    @property
    def num_ideals(self) -> int:
        return len(self.members)

    def words(self) -> npt.NDArray[np.uint64]:
        """Return the members as bit sets, uint64 [num_ideals, ceil(num_nodes / 64)]."""
        return pack_bits(self.members)


def ideal_lattice(num_nodes: int, edges: Sequence[tuple[int, int]], *, max_ideals: int = MAX_IDEALS) -> IdealLattice:
    """Return the lattice of ideals of a DAG; raises InvalidArgument for a cycle or for more than `max_ideals`."""
    predecessors = [0] * num_nodes
    successors = [0] * num_nodes
    for source, target in edges:
        predecessors[target] |= 1 << source
        successors[source] |= 1 << target
    seen = {0}
    layer = [0]
    while layer:
        grown: set[int] = set()
        for ideal in layer:
            for node in range(num_nodes):
                bit = 1 << node
                if not ideal & bit and predecessors[node] & ~ideal == 0:
                    grown.add(ideal | bit)
        layer = sorted(grown)
        seen |= grown
        if len(seen) > max_ideals:
            raise InvalidArgument(
                f"the graph has more than {max_ideals} ideals",
                field="edges",
                hint="use the linearised search for wide graphs",
            )
    whole = (1 << num_nodes) - 1
    if whole not in seen:
        raise InvalidArgument("the edges form a cycle", field="edges")
    ordered = sorted(seen, key=lambda ideal: (ideal.bit_count(), ideal))
    members = np.array([[ideal >> node & 1 for node in range(num_nodes)] for ideal in ordered], dtype=np.bool_)
    frontier = np.array(
        [
            [
                bool(ideal >> node & 1) and (successors[node] == 0 or bool(successors[node] & ~ideal))
                for node in range(num_nodes)
            ]
            for ideal in ordered
        ],
        dtype=np.bool_,
    )
    shape = (len(ordered), num_nodes)
    return IdealLattice(num_nodes, members.reshape(shape), frontier.reshape(shape))


def pack_bits(members: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    """Return rows of booleans as rows of 64-bit words, lowest bit first."""
    rows, columns = members.shape
    num_words = max(1, -(-columns // 64))
    padded = np.zeros((rows, num_words * 64), dtype=np.bool_)
    padded[:, :columns] = members
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint64)
