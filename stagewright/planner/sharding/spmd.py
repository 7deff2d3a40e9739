"""The program every device runs: operators on local shards, collectives between them, each counted and priced.

A lowering takes one strategy an operator and the layouts of what comes in and must go out; where a tensor lies otherwise
than its reader needs, the cheapest redistribution is inserted, once for each layout that anyone needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stagewright.planner.sharding.layout import Layout, Mesh
from stagewright.planner.sharding.operator_graph import Dims, GraphOperator, OperatorGraph
from stagewright.planner.sharding.redistribution import Price, Step, redistribute, sent
from stagewright.planner.sharding.rules import Strategy


class MoveCosts:
    """The price of bringing a graph's tensors from one layout to another, computed once each."""

    def __init__(self, mesh: Mesh, graph: OperatorGraph, price: Price = sent) -> None:
        self.mesh = mesh
        self.graph = graph
        self._price = price
        self._steps: dict[tuple[Dims, Layout, Layout], tuple[Step, ...]] = {}

    def steps(self, name: str, before: Layout, after: Layout) -> tuple[Step, ...]:
        """Return the cheapest steps."""
        if before == after:
            return ()
        key = (self.graph.tensors[name], before, after)
        if key not in self._steps:
            self._steps[key] = redistribute(
                self.mesh,
                before,
                after,
                dims=self.graph.tensors[name],
                sizes=self.graph.sizes,
                size_bytes=self.graph.size_bytes(name),
                price=self._price,
            )
        return self._steps[key]

    def __call__(self, name: str, before: Layout, after: Layout) -> float:
        return sum(map(self._price, self.steps(name, before, after)))


@dataclass(frozen=True)
class Move:
    """A tensor brought from one layout to another, in the forward or in the backward."""

    tensor: str
    before: Layout
    after: Layout
    steps: tuple[Step, ...]
    backward: bool


@dataclass(frozen=True)
class LocalOperator:
    """An operator on shards, its inputs in these layouts."""

    operator: GraphOperator
    strategy: Strategy


@dataclass(frozen=True)
class SpmdProgram:
    """What each device of a mesh runs, in order.

    Parameters
    ----------
    layouts : how each tensor lies when it is written (or comes in).
    """

    mesh: Mesh
    graph: OperatorGraph
    layouts: Mapping[str, Layout]
    instructions: tuple[Move | LocalOperator, ...]

    def collectives(self, *, backward: bool | None = None) -> Counter[tuple[str, str]]:
        """Return how many collectives of each (axis name, kind) run, in all or in one half of a step."""
        return Counter((self.mesh.axes[step.axis], step.kind) for step in self._steps(backward))

    def sent_bytes(self, *, backward: bool | None = None) -> float:
        """Return the bytes each device sends."""
        return sum(step.sent_bytes for step in self._steps(backward))

    def cost(self, price: Price) -> float:
        """Return the price of all collectives."""
        return sum(map(price, self._steps(None)))

    def _steps(self, backward: bool | None) -> list[Step]:
        steps: list[Step] = []
        for instruction in self.instructions:
            if isinstance(instruction, Move) and backward in (None, instruction.backward):
                steps += [step for step in instruction.steps if step.kind != "local"]
        return steps


def lower(
    mesh: Mesh,
    graph: OperatorGraph,
    chosen: Sequence[Strategy],
    sources: Mapping[str, Layout],
    wanted: Mapping[str, Layout],
    *,
    price: Price = sent,
    keep_gathered: bool = True,
) -> SpmdProgram:
    """Return the program of one strategy an operator.

    Parameters
    ----------
    chosen : a strategy for each operator, in their order.
    sources : layouts of the graph's inputs and parameters; replicated where not named.
    wanted : layouts that outputs must end in; as they come where not named.
    keep_gathered : whether parameters brought to another layout in the forward stay for the backward; FSDP frees them.
    """
    moves = MoveCosts(mesh, graph, price)
    layouts = {name: sources.get(name, mesh.replicated) for name in graph.sources}
    held: dict[str, set[Layout]] = {name: {layout} for name, layout in layouts.items()}
    instructions: list[Move | LocalOperator] = []
    backward = False

    def bring(name: str, layout: Layout) -> None:
        if layout in held[name]:
            return
        steps = moves.steps(name, layouts[name], layout)
        instructions.append(Move(name, layouts[name], layout, steps, backward))
        held[name].add(layout)

    for index, (operator, strategy) in enumerate(zip(graph.operators, chosen, strict=True)):
        if index == graph.backward_from:
            for name in (name for name in wanted if name in held):
                bring(name, wanted[name])
            if not keep_gathered:
                held.update({name: {layouts[name]} for name in graph.parameters})
            backward = True
        for name, layout in zip(operator.inputs, strategy.inputs, strict=True):
            bring(name, layout)
        instructions.append(LocalOperator(operator, strategy))
        layouts[operator.output] = strategy.output
        held[operator.output] = {strategy.output}
    for name, layout in wanted.items():
        bring(name, layout)
    return SpmdProgram(mesh, graph, layouts, tuple(instructions))
