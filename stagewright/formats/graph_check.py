"""The check that readers of node-and-edge files share: ids are unique, and edges name nodes that exist."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stagewright.planner.errors import InvalidDocument


def check_ids(ids: Sequence[int], edges: Iterable[tuple[int, int]], *, source: str) -> None:
    """Raise InvalidDocument, naming the file and the edge, for a repeated id or an edge to nowhere."""
    known = set(ids)
    if len(known) != len(ids):
        raise InvalidDocument(f"{source}: two nodes have one id", field="nodes")
    for index, edge in enumerate(edges):
        for end in edge:
            if end not in known:
                raise InvalidDocument(
                    f"{source}: edges[{index}] names node {end}, which does not exist", field=f"edges[{index}]"
                )
