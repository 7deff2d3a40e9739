"""Unity's joint search (Unger et al., OSDI 2022): rewrite the graph and shard it, together.

Unity's parallelization operators (partition, combine, replicate, reduce) are the redistributions of this package. Its
algebraic substitutions are rewrites that keep what a graph computes:

    fuse linears     x w1 + x w2  ->  x (w1 + w2)     one product, one weight gradient to sum
    fuse inputs      x w + y w    ->  (x + y) w
    reassociate      (x w1) w2    ->  x (w1 w2)       no function between
    merge additions  (a + b) + c  ->  a + b + c       partial sums are reduced once

`best_first` explores them from the cheapest graph found so far, each graph sharded exactly by `intra_operator`. Every
rewrite is checked on random arrays by the tests. Not exhaustive beyond its budget of graphs.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from stagewright.planner.sharding.intra_operator import LayerProblem, LayerSharding, shard_layer
from stagewright.planner.sharding.operator_graph import GraphOperator, OperatorGraph, with_backward


@dataclass(frozen=True)
class Rewritten:
    """A graph and the substitutions that led to it."""

    graph: OperatorGraph
    names: tuple[str, ...]
    sharding: LayerSharding


def best_first(
    graph: OperatorGraph,
    problem: Callable[[OperatorGraph], LayerProblem],
    *,
    training: bool = True,
    most_graphs: int = 50,
    worst_factor: float = 1.05,
) -> Rewritten:
    """Return the cheapest of the graphs reached by substitutions.

    Parameters
    ----------
    graph : a forward graph.
    problem : from a graph (with its backward when `training`) to the sharding problem.
    most_graphs : graphs to shard at most.
    worst_factor : graphs this much worse than the best are not rewritten further (Unity's alpha).
    """

    def solve(forward: OperatorGraph, names: tuple[str, ...]) -> Rewritten:
        return Rewritten(forward, names, shard_layer(problem(with_backward(forward) if training else forward)))

    best = solve(graph, ())
    seen = {_form(graph)}
    number = itertools.count()
    queue = [(best.sharding.cost, next(number), best)]
    while queue and len(seen) < most_graphs:
        cost, _, current = heapq.heappop(queue)
        if cost > worst_factor * best.sharding.cost:
            break
        for name, following in substitutions(current.graph):
            if _form(following) in seen or len(seen) >= most_graphs:
                continue
            seen.add(_form(following))
            found = solve(following, (*current.names, name))
            if found.sharding.cost < best.sharding.cost:
                best = found
            heapq.heappush(queue, (found.sharding.cost, next(number), found))
    return best


def substitutions(graph: OperatorGraph) -> Iterator[tuple[str, OperatorGraph]]:
    """Yield every graph one substitution away, with the substitution's name."""
    uses = Counter(name for operator in graph.operators for name in operator.inputs)
    uses.update(graph.outputs)
    for index, operator in enumerate(graph.operators):
        for position, name in enumerate(operator.inputs):
            producer = graph.producer.get(name)
            if producer is None or uses[name] != 1:
                continue
            inner = graph.operators[producer]
            if operator.kind == inner.kind == "add" and graph.tensors[name] == graph.tensors[operator.output]:
                inputs = (*operator.inputs[:position], *inner.inputs, *operator.inputs[position + 1 :])
                yield "merge additions", _replaced(graph, {producer: [], index: [replace(operator, inputs=inputs)]})
            if _is_product(operator) and _is_product(inner) and position == 0:
                yield from _reassociated(graph, producer, index)
        if operator.kind == "add":
            yield from _fused(graph, index, uses)


def _is_product(operator: GraphOperator) -> bool:
    return operator.kind == "einsum" and len(operator.inputs) == 2


def _reassociated(graph: OperatorGraph, producer: int, index: int) -> Iterator[tuple[str, OperatorGraph]]:
    """Yield x (w1 w2) where (x w1) w2 sums a dimension that x lacks, so that the weights can be multiplied first."""
    inner, outer = graph.operators[producer], graph.operators[index]
    x, first = inner.inputs
    second = outer.inputs[1]
    tensors = graph.tensors
    middle = set(tensors[inner.output]) - set(tensors[x])
    contracted = middle - set(tensors[outer.output])
    shared = set(tensors[x]) & set(tensors[second])
    if not {first, second} <= set(graph.parameters) or middle != contracted or not contracted or shared:
        return
    weights = f"{first}*{second}"
    dims = tuple(dim for dim in (*tensors[first], *tensors[second]) if dim not in contracted)
    product = GraphOperator("einsum", (first, second), weights)
    fused = GraphOperator("einsum", (x, weights), outer.output)
    changed = replace(graph, tensors={**tensors, weights: dims})
    yield "reassociate", _replaced(changed, {producer: [product], index: [fused]})


def _fused(graph: OperatorGraph, index: int, uses: Counter[str]) -> Iterator[tuple[str, OperatorGraph]]:
    """Yield the graphs in which two products of one addition that share a factor become one."""
    addition = graph.operators[index]
    products = [
        (position, graph.producer[name])
        for position, name in enumerate(addition.inputs)
        if name in graph.producer and uses[name] == 1 and _is_product(graph.operators[graph.producer[name]])
    ]
    for (_, one), (other_at, other) in itertools.combinations(products, 2):
        first, second = graph.operators[one], graph.operators[other]
        for side, name in ((0, "fuse linears"), (1, "fuse inputs")):
            kept, summed = first.inputs[side], first.inputs[1 - side]
            partner = second.inputs[1 - side]
            if second.inputs[side] != kept or graph.tensors[summed] != graph.tensors[partner] or summed == partner:
                continue
            total = f"{summed}+{partner}"
            if total in graph.tensors:
                continue
            factors = (kept, total) if side == 0 else (total, kept)
            result = GraphOperator("einsum", factors, first.output)
            inputs = tuple(item for place, item in enumerate(addition.inputs) if place != other_at)
            rest = [replace(addition, inputs=inputs)] if len(inputs) > 1 else []
            if not rest:
                result = replace(result, output=addition.output)
            changed = replace(graph, tensors={**graph.tensors, total: graph.tensors[summed]})
            later = max(one, other)
            parts: dict[int, list[GraphOperator]] = {one: [], other: [], index: rest}
            parts[later] = [GraphOperator("add", (summed, partner), total), result]
            yield name, _replaced(changed, parts)


def _replaced(graph: OperatorGraph, parts: dict[int, list[GraphOperator]]) -> OperatorGraph:
    """Return the graph with some operators replaced by others, unused tensors dropped."""
    operators = tuple(item for index, operator in enumerate(graph.operators) for item in parts.get(index, [operator]))
    named = {name for operator in operators for name in (*operator.inputs, operator.output)} | set(graph.sources)
    tensors = {name: dims for name, dims in graph.tensors.items() if name in named}
    return replace(graph, operators=operators, tensors=tensors)


def _form(graph: OperatorGraph) -> tuple[object, ...]:
    return tuple((operator.kind, operator.inputs, operator.output) for operator in graph.operators)
