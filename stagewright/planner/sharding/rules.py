"""What an operator may do on one mesh axis: placements of its inputs that give a placement of its output.

A rule either splits one dimension of the operator's index space (an input without it is replicated; an output without it
becomes partial), or lets a partial sum pass through a linear operator, or replicates everything. These are the SBP
signatures of OneFlow, the partition-n-reduce strategies of Tofu (Wang et al., EuroSys 2019), and the legal layouts of
Mesh-TensorFlow, derived from the operator's form instead of listed by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from stagewright.planner.sharding.layout import PARTIAL, REPLICATED, Layout, Mesh, Placement, fits, split
from stagewright.planner.sharding.operator_graph import GraphOperator, OperatorGraph


@dataclass(frozen=True)
class Rule:
    """Placements of an operator's tensors on one axis; `dim` is the dimension that is split, if any."""

    inputs: tuple[Placement, ...]
    output: Placement
    dim: str = ""

    @property
    def divides_work(self) -> bool:
        """Whether the devices of the axis share the work instead of repeating it."""
        return bool(self.dim)


def rules(graph: OperatorGraph, operator: GraphOperator) -> tuple[Rule, ...]:
    """Return every rule of an operator on one axis, replication first."""
    dims = [graph.tensors[name] for name in operator.inputs]
    output = graph.tensors[operator.output]
    found = [Rule((REPLICATED,) * len(dims), REPLICATED)]
    if operator.kind == "rename":
        found += [Rule((split(before),), split(after), before) for before, after in zip(dims[0], output, strict=True)]
    else:
        for dim in graph.dims_of(operator):
            if dim in operator.whole or (operator.kind != "einsum" and dim not in output):
                continue
            inputs = tuple(split(dim) if dim in names else REPLICATED for names in dims)
            found.append(Rule(inputs, split(dim) if dim in output else PARTIAL, dim))
    if operator.kind in ("add", "rename"):
        found.append(Rule((PARTIAL,) * len(dims), PARTIAL))
    elif operator.kind == "einsum":
        for position in range(len(dims)):
            inputs = tuple(PARTIAL if index == position else REPLICATED for index in range(len(dims)))
            found.append(Rule(inputs, PARTIAL))
    return tuple(found)


@dataclass(frozen=True)
class Strategy:
    """One rule for each mesh axis, as layouts; `num_workers` devices share the work, the others repeat it."""

    inputs: tuple[Layout, ...]
    output: Layout
    num_workers: int

    @property
    def key(self) -> tuple[tuple[Layout, ...], Layout]:
        return self.inputs, self.output


class Strategies:
    """Every strategy of a graph's operators on a mesh, made once for each form of operator."""

    def __init__(self, mesh: Mesh, graph: OperatorGraph) -> None:
        self.mesh = mesh
        self.graph = graph
        self._found: dict[tuple[object, ...], tuple[Strategy, ...]] = {}

    def of(self, operator: GraphOperator) -> tuple[Strategy, ...]:
        """Return the strategies of one operator that divide its tensors evenly."""
        dims = tuple(self.graph.tensors[name] for name in (*operator.inputs, operator.output))
        key = (operator.kind, operator.whole, dims)
        if key not in self._found:
            self._found[key] = _strategies(self.mesh, self.graph, operator)
        return self._found[key]


def _strategies(mesh: Mesh, graph: OperatorGraph, operator: GraphOperator) -> tuple[Strategy, ...]:
    found: dict[tuple[tuple[Layout, ...], Layout], Strategy] = {}
    for chosen in itertools.product(rules(graph, operator), repeat=len(mesh.axes)):
        inputs = tuple(tuple(rule.inputs[position] for rule in chosen) for position in range(len(operator.inputs)))
        output = tuple(rule.output for rule in chosen)
        names = (*operator.inputs, operator.output)
        if not all(
            fits(mesh, layout, graph.tensors[name], graph.sizes)
            for name, layout in zip(names, (*inputs, output), strict=True)
        ) or not _divides(mesh, graph.sizes, chosen):
            continue
        workers = 1
        for rule, size in zip(chosen, mesh.sizes, strict=True):
            workers *= size if rule.divides_work else 1
        strategy = Strategy(inputs, output, workers)
        known = found.get(strategy.key)
        if known is None or known.num_workers < workers:
            found[strategy.key] = strategy
    return tuple(found.values())


def _divides(mesh: Mesh, sizes: Mapping[str, int], chosen: tuple[Rule, ...]) -> bool:
    """Tell whether each dimension is divided evenly by all axes that split it (a contracted one too)."""
    parts: dict[str, int] = {}
    for rule, size in zip(chosen, mesh.sizes, strict=True):
        if rule.dim:
            parts[rule.dim] = parts.get(rule.dim, 1) * size
    return all(sizes[dim] % count == 0 for dim, count in parts.items())
