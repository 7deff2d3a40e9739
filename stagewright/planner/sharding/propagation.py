"""A few annotations, and the layout of every tensor follows (GSPMD, Xu et al. 2021; PartIR, Alabed et al. 2024).

Axis by axis: where some tensors of an operator are split and exactly one of its rules agrees with all that is known, the
other tensors take that rule's placements; forwards and backwards over the graph until nothing changes. What stays unknown
is replicated. Annotations come as tactics, applied in order: what an earlier one implied stands (PartIR). Where no rule
reconciles what is known, that is a conflict: everything stands, and a redistribution is inserted.

A partial result stays partial through linear operators and is reduced where a reader needs it, which is where GSPMD's
all-reduces end after reassociation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stagewright.planner.sharding.layout import PARTIAL, REPLICATED, Layout, Mesh, Placement, fits
from stagewright.planner.sharding.operator_graph import GraphOperator, OperatorGraph
from stagewright.planner.sharding.redistribution import Price, sent
from stagewright.planner.sharding.rules import Rule, Strategies, Strategy, rules
from stagewright.planner.sharding.spmd import MoveCosts, SpmdProgram, lower

Annotations = Mapping[str, Mapping[str, Placement]]


@dataclass(frozen=True)
class Propagated:
    """What follows from annotations.

    Parameters
    ----------
    layouts : placements of every tensor, unknown axes replicated.
    num_inferred : (tensor, axis) pairs that were split by inference alone.
    conflicts : outputs of operators whose known placements no rule reconciles, by axis name.
    """

    layouts: Mapping[str, Layout]
    num_inferred: int
    conflicts: tuple[tuple[str, str], ...]


def propagate(mesh: Mesh, graph: OperatorGraph, *tactics: Annotations) -> Propagated:
    """Return the layouts that follow from placements by tensor and axis name; gradients lie as what they belong to.

    Raises
    ------
    InvalidArgument : for an axis the mesh has not.
    """
    known: dict[str, list[Placement | None]] = {name: [None] * len(mesh.axes) for name in graph.tensors}
    given: set[tuple[str, int]] = set()
    conflicts: set[tuple[str, str]] = set()
    for tactic in tactics:
        for name, placements in tactic.items():
            mesh.layout(placements)
            for axis_name, placement in placements.items():
                for lies in {name, graph.gradients.get(name, name)}:
                    known[lies][mesh.axes.index(axis_name)] = placement
                    given.add((lies, mesh.axes.index(axis_name)))
        for axis in range(len(mesh.axes)):
            while _sweep(mesh, graph, axis, known, conflicts):
                pass
    layouts = {name: tuple(placement or REPLICATED for placement in row) for name, row in known.items()}
    inferred = sum(
        placement.kind == "split" and (name, axis) not in given
        for name, layout in layouts.items()
        for axis, placement in enumerate(layout)
    )
    return Propagated(layouts, inferred, tuple(sorted(conflicts)))


def _sweep(
    mesh: Mesh,
    graph: OperatorGraph,
    axis: int,
    known: dict[str, list[Placement | None]],
    conflicts: set[tuple[str, str]],
) -> bool:
    changed = False
    for operator in (*graph.operators, *reversed(graph.operators)):
        names = (*operator.inputs, operator.output)
        have = [known[name][axis] for name in names]
        if not any(placement is not None and placement.kind == "split" for placement in have):
            continue
        agreeing = [
            rule
            for rule in rules(graph, operator)
            if rule.dim and all(_agrees(a, b) for a, b in zip(have, (*rule.inputs, rule.output), strict=True))
        ]
        if not agreeing:
            conflicts.add((operator.output, mesh.axes[axis]))
        elif len(agreeing) == 1:
            changed |= _take(mesh, graph, axis, known, names, agreeing[0])
    return changed


def _agrees(known: Placement | None, ruled: Placement) -> bool:
    """Tell whether what is known of a tensor goes with a rule; a partial result may be reduced to anything."""
    return known is None or known == ruled or ruled.kind == "partial"


def _take(
    mesh: Mesh,
    graph: OperatorGraph,
    axis: int,
    known: dict[str, list[Placement | None]],
    names: Sequence[str],
    rule: Rule,
) -> bool:
    changed = False
    for name, placement in zip(names, (*rule.inputs, rule.output), strict=True):
        if known[name][axis] is not None or placement.kind != "split":
            continue
        layout = tuple(placement if index == axis else other or REPLICATED for index, other in enumerate(known[name]))
        if fits(mesh, layout, graph.tensors[name], graph.sizes):
            known[name][axis] = placement
            changed = True
    return changed


def partition(
    mesh: Mesh, graph: OperatorGraph, *tactics: Annotations, price: Price = sent, keep_gathered: bool = True
) -> tuple[SpmdProgram, Propagated]:
    """Return the SPMD program that tactics lead to.

    Each operator takes a strategy that agrees with the propagated layouts on as many axes as can be; among those, the one
    that costs least to bring its inputs and its output where they must be, more devices sharing the work breaking ties.
    Gradients end as the tensors they belong to.
    """
    found = propagate(mesh, graph, *tactics)
    moves, strategies = MoveCosts(mesh, graph, price), Strategies(mesh, graph)
    sources = {name: found.layouts[name] for name in graph.sources}
    held = {name: [layout] for name, layout in sources.items()}
    chosen = []
    for operator in graph.operators:
        strategy = _cheapest(moves, strategies.of(operator), operator, held, found.layouts)
        for name, layout in zip(operator.inputs, strategy.inputs, strict=True):
            held[name].append(layout)
        held[operator.output] = [strategy.output]
        chosen.append(strategy)
    wanted = {name: found.layouts[name] for name in graph.outputs}
    wanted.update({gradient: found.layouts[name] for name, gradient in graph.gradients.items()})
    return lower(mesh, graph, chosen, sources, wanted, price=price, keep_gathered=keep_gathered), found


def _cheapest(
    moves: MoveCosts,
    choices: Sequence[Strategy],
    operator: GraphOperator,
    held: Mapping[str, Sequence[Layout]],
    propagated: Mapping[str, Layout],
) -> Strategy:
    goal = propagated[operator.output]
    best: tuple[int, float, int, Strategy] | None = None
    for strategy in choices:
        if any(have != want and have.kind == "split" for have, want in zip(strategy.output, goal, strict=True)):
            continue
        cost = moves(operator.output, strategy.output, goal) + sum(
            moves(name, held[name][0], layout)
            for name, layout in zip(operator.inputs, strategy.inputs, strict=True)
            if layout not in held[name]
        )
        disagreeing = _disagreeing_axes(operator, strategy, propagated)
        if best is None or (disagreeing, cost, -strategy.num_workers) < best[:3]:
            best = (disagreeing, cost, -strategy.num_workers, strategy)
    assert best is not None, "replication always works"
    return best[3]


def _disagreeing_axes(operator: GraphOperator, strategy: Strategy, propagated: Mapping[str, Layout]) -> int:
    """Return on how many axes a strategy wants tensors elsewhere than they were propagated, partial sums aside."""
    pairs = [
        *zip(strategy.inputs, (propagated[name] for name in operator.inputs), strict=True),
        (strategy.output, propagated[operator.output]),
    ]
    return sum(
        any(have[axis] not in (want[axis], PARTIAL) for have, want in pairs) for axis in range(len(strategy.output))
    )
