"""Automap (Alabed et al., 2022; Schaarschmidt et al., 2021): a tree search over a few annotations, propagation does the rest.

A state is a sequence of annotations (tensor, dimension) on one mesh axis; its value is the price of the program that
propagation makes of it, devices' repeated work included. Monte Carlo tree search with upper confidence bounds picks what
to annotate next; tensors are offered by size, the largest first, which stands in for the paper's learned ranker. Seeded
and deterministic; no guarantee.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from stagewright.planner.sharding.layout import Layout, Mesh, Placement, fits, num_shards, split
from stagewright.planner.sharding.operator_graph import OperatorGraph
from stagewright.planner.sharding.propagation import Annotations, partition
from stagewright.planner.sharding.redistribution import Price, sent
from stagewright.planner.sharding.spmd import LocalOperator, SpmdProgram

Action = tuple[str, Placement]


@dataclass(frozen=True)
class AutomapAnswer:
    """The best annotations found, their program, its price, and how many programs were priced."""

    annotations: tuple[Action, ...]
    program: SpmdProgram
    cost: float
    evaluated: int


@dataclass
class _Node:
    visits: int = 0
    total: float = 0.0
    children: dict[Action | None, _Node] = field(default_factory=dict)


def automap(
    mesh: Mesh,
    graph: OperatorGraph,
    axis: str,
    *,
    settled: Annotations | None = None,
    price: Price = sent,
    price_per_flop: float = 0.0,
    price_per_held_byte: float = 0.0,
    most_annotations: int = 3,
    num_offered: int = 8,
    budget: int = 100,
    seed: int = 0,
) -> AutomapAnswer:
    """Return the best few annotations of one axis.

    Parameters
    ----------
    settled : placements that stand before the search (the batch on another axis).
    price_per_flop, price_per_held_byte : what a device's own work and its share of the parameters cost.
    budget : programs to price.
    """
    search = _Search(mesh, graph, axis, settled or {}, price, price_per_flop, price_per_held_byte, num_offered)
    draw = random.Random(seed)
    root = _Node()
    start, _ = search.value(())
    best: tuple[float, tuple[Action, ...]] = (start, ())
    while len(search.values) < budget:
        before = len(search.values)
        taken: list[Action] = []
        path = [root]
        while len(taken) < most_annotations:
            action = _select(path[-1], search.actions(tuple(taken)), draw)
            path.append(path[-1].children.setdefault(action, _Node()))
            if action is None:
                break
            taken.append(action)
            if path[-1].visits == 0:
                break
        cost, _ = search.value(tuple(taken))
        best = min(best, (cost, tuple(taken)))
        for node in path:
            node.visits += 1
            node.total += start / max(cost, 1e-12 * max(start, 1e-30))
        if len(search.values) == before and root.visits > 20 * budget:
            break
    cost, program = search.value(best[1])
    return AutomapAnswer(best[1], program, cost, len(search.values))


def _select(node: _Node, actions: list[Action], draw: random.Random) -> Action | None:
    """Return an action not tried yet, else the one of the highest upper confidence bound; None stops here."""
    options: list[Action | None] = [None, *actions]
    fresh = [action for action in options if action not in node.children]
    if fresh:
        return fresh[0] if len(fresh) == len(options) else draw.choice(fresh)
    scale = max(child.total / child.visits for child in node.children.values())

    def bound(action: Action | None) -> float:
        child = node.children[action]
        return child.total / child.visits / scale + math.sqrt(math.log(node.visits) / child.visits)

    return max(options, key=bound)


class _Search:
    def __init__(
        self,
        mesh: Mesh,
        graph: OperatorGraph,
        axis: str,
        settled: Annotations,
        price: Price,
        price_per_flop: float,
        price_per_held_byte: float,
        num_offered: int,
    ) -> None:
        self._mesh, self._graph, self._axis, self._settled = mesh, graph, axis, settled
        self._price, self._per_flop, self._per_byte = price, price_per_flop, price_per_held_byte
        forward = graph.operators[: graph.backward_from]
        names = [*graph.sources, *(operator.output for operator in forward)]
        self._offered = sorted(names, key=lambda name: (-graph.num_elements(name), name))[:num_offered]
        self.values: dict[frozenset[Action], tuple[float, SpmdProgram]] = {}

    def actions(self, taken: tuple[Action, ...]) -> list[Action]:
        """Return what may be annotated next: offered tensors that nobody annotated, by each dimension that divides."""
        done = {name for name, _ in taken}
        return [
            (name, split(dim))
            for name in self._offered
            if name not in done
            for dim in self._graph.tensors[name]
            if self._divides(name, dim)
        ]

    def _divides(self, name: str, dim: str) -> bool:
        layout: Layout = self._mesh.layout({self._axis: split(dim)})
        return fits(self._mesh, layout, self._graph.tensors[name], self._graph.sizes)

    def value(self, taken: tuple[Action, ...]) -> tuple[float, SpmdProgram]:
        """Return the price and the program of some annotations, applied in order."""
        key = frozenset(taken)
        if key not in self.values:
            tactics: list[Mapping[str, Mapping[str, Placement]]] = [self._settled]
            tactics += [{name: {self._axis: placement}} for name, placement in taken]
            program, _ = partition(self._mesh, self._graph, *tactics, price=self._price)
            self.values[key] = (self._cost(program), program)
        return self.values[key]

    def _cost(self, program: SpmdProgram) -> float:
        graph = self._graph
        work = sum(
            graph.flops(item.operator) / item.strategy.num_workers
            for item in program.instructions
            if isinstance(item, LocalOperator)
        )
        held = sum(graph.size_bytes(name) / num_shards(self._mesh, program.layouts[name]) for name in graph.parameters)
        return program.cost(self._price) + self._per_flop * work + self._per_byte * held
