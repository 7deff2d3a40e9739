"""A layer as a graph of operators over tensors with named dimensions, and its backward.

Four kinds of operator are enough for transformers and convolution-free networks:

    einsum   a product summed over the dimensions that its output lacks; linear in each input
    add      the sum of its inputs; an input that lacks a dimension is broadcast along it
    map      a function of each position; dimensions in `whole` are read together (softmax, norm)
    rename   the same numbers under another dimension name (the keys' positions)

`with_backward` appends the gradient of every parameter and input, so that what a training step exchanges can be derived.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from stagewright.planner.errors import InvalidArgument

Dims = tuple[str, ...]
OperatorKind = Literal["einsum", "add", "map", "rename"]


@dataclass(frozen=True)
class GraphOperator:
    """One operator: `function` names what a map computes, `whole` the dimensions it needs together."""

    kind: OperatorKind
    inputs: tuple[str, ...]
    output: str
    function: str = ""
    whole: Dims = ()


@dataclass(frozen=True)
class OperatorGraph:
    """Operators in an order they can run in.

    Parameters
    ----------
    sizes : elements of each dimension.
    tensors : dimensions of each tensor by name.
    inputs, parameters, outputs : names of tensors; those of the first two have no producer.
    gradients : for a graph with a backward, the gradient's name of each parameter and input.
    element_bytes : bytes of one element.
    backward_from : index of the first operator of the backward.

    Raises
    ------
    InvalidArgument : for an operator that reads what nothing wrote, or writes a tensor twice.
    """

    sizes: Mapping[str, int]
    tensors: Mapping[str, Dims]
    operators: tuple[GraphOperator, ...]
    inputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    gradients: Mapping[str, str] = field(default_factory=dict)
    element_bytes: float = 2.0
    backward_from: int | None = None

    def __post_init__(self) -> None:
        ready = {*self.inputs, *self.parameters}
        for operator in self.operators:
            missing = [name for name in operator.inputs if name not in ready]
            if missing:
                raise InvalidArgument(
                    f"operator for {operator.output!r} reads {missing[0]!r}, which nothing wrote before",
                    field="operators",
                    hint="list operators in an order they can run in",
                )
            if operator.output in ready:
                raise InvalidArgument(
                    f"tensor {operator.output!r} is written twice", field="operators", hint="give it another name"
                )
            ready.add(operator.output)

    @cached_property
    def producer(self) -> dict[str, int]:
        """Index of the operator that writes each tensor."""
        return {operator.output: index for index, operator in enumerate(self.operators)}

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Tensors that no operator writes."""
        return (*self.inputs, *self.parameters)

    def num_elements(self, name: str) -> int:
        """Return the elements of a tensor."""
        return math.prod(self.sizes[dim] for dim in self.tensors[name])

    def size_bytes(self, name: str) -> float:
        """Return the bytes of a whole tensor."""
        return self.num_elements(name) * self.element_bytes

    def flops(self, operator: GraphOperator) -> float:
        """Return the FLOP of an einsum: a multiplication and an addition for each point of its index space; else 0."""
        if operator.kind != "einsum" or len(operator.inputs) < 2:
            return 0.0
        return 2.0 * math.prod(self.sizes[dim] for dim in self.dims_of(operator))

    def dims_of(self, operator: GraphOperator) -> Dims:
        """Return every dimension of an operator's tensors, in order of appearance."""
        names = (*operator.inputs, operator.output)
        return tuple(dict.fromkeys(dim for name in names for dim in self.tensors[name]))


class GraphBuilder:
    """Writes an operator graph; each method returns the name of its result."""

    def __init__(self, sizes: Mapping[str, int], element_bytes: float = 2.0) -> None:
        self._sizes = dict(sizes)
        self._tensors: dict[str, Dims] = {}
        self._operators: list[GraphOperator] = []
        self._inputs: list[str] = []
        self._parameters: list[str] = []
        self._element_bytes = element_bytes

    def input(self, name: str, *dims: str) -> str:
        self._inputs.append(name)
        return self._declare(name, dims)

    def parameter(self, name: str, *dims: str) -> str:
        self._parameters.append(name)
        return self._declare(name, dims)

    def einsum(self, name: str, inputs: Sequence[str], *dims: str) -> str:
        return self._append(GraphOperator("einsum", tuple(inputs), name), dims)

    def add(self, name: str, inputs: Sequence[str]) -> str:
        widest = max((self._tensors[item] for item in inputs), key=len)
        return self._append(GraphOperator("add", tuple(inputs), name), widest)

    def map(self, name: str, function: str, inputs: Sequence[str], *, whole: Dims = ()) -> str:
        return self._append(GraphOperator("map", tuple(inputs), name, function, whole), self._tensors[inputs[0]])

    def rename(self, name: str, source: str, *dims: str) -> str:
        return self._append(GraphOperator("rename", (source,), name), dims)

    def graph(self, *outputs: str) -> OperatorGraph:
        """Return what was written."""
        return OperatorGraph(
            self._sizes,
            self._tensors,
            tuple(self._operators),
            tuple(self._inputs),
            tuple(self._parameters),
            outputs,
            element_bytes=self._element_bytes,
        )

    def _declare(self, name: str, dims: Dims) -> str:
        unknown = [dim for dim in dims if dim not in self._sizes]
        if unknown:
            raise InvalidArgument(
                f"tensor {name!r} has dimension {unknown[0]!r}, which has no size",
                field="sizes",
                hint="known: " + ", ".join(self._sizes),
            )
        self._tensors[name] = dims
        return name

    def _append(self, operator: GraphOperator, dims: Dims) -> str:
        self._operators.append(operator)
        return self._declare(operator.output, dims)


def with_backward(graph: OperatorGraph) -> OperatorGraph:
    """Return the graph with the gradient of its only output as an input and every source's gradient computed.

    Raises
    ------
    InvalidArgument : for several outputs, or an einsum of one input (its gradient is no einsum).
    """
    if len(graph.outputs) != 1:
        raise InvalidArgument(
            f"a backward starts from one output, the graph has {len(graph.outputs)}", field="outputs", hint="name one"
        )
    backward = _Backward(graph)
    return backward.run(graph.outputs[0])


class _Backward:
    def __init__(self, graph: OperatorGraph) -> None:
        self._graph = graph
        self._tensors = dict(graph.tensors)
        self._operators: list[GraphOperator] = []
        self._summands: dict[str, list[str]] = {}

    def run(self, output: str) -> OperatorGraph:
        graph, seed = self._graph, f"d_{output}"
        self._tensors[seed] = graph.tensors[output]
        self._summands[output] = [seed]
        for operator in reversed(graph.operators):
            gradient = self._total(operator.output)
            if gradient is not None:
                for position, name in enumerate(operator.inputs):
                    self._differentiate(operator, position, name, gradient)
        gradients = {name: self._total(name) for name in graph.sources}
        return replace(
            graph,
            tensors=self._tensors,
            operators=(*graph.operators, *self._operators),
            inputs=(*graph.inputs, seed),
            gradients={name: gradient for name, gradient in gradients.items() if gradient is not None},
            outputs=(*graph.outputs, *(gradient for gradient in gradients.values() if gradient is not None)),
            backward_from=len(graph.operators),
        )

    def _total(self, name: str) -> str | None:
        parts = self._summands.get(name, [])
        if len(parts) <= 1:
            return parts[0] if parts else None
        total = f"d_{name}"
        self._emit(GraphOperator("add", tuple(parts), total), self._graph.tensors[name])
        self._summands[name] = [total]
        return total

    def _emit(self, operator: GraphOperator, dims: Dims) -> None:
        self._tensors[operator.output] = dims
        self._operators.append(operator)

    def _differentiate(self, operator: GraphOperator, position: int, name: str, gradient: str) -> None:
        dims = self._graph.tensors[name]
        result = f"d_{name}_from_{operator.output}" + (f"_{position}" if operator.inputs.count(name) > 1 else "")
        if operator.kind == "einsum":
            others = [item for index, item in enumerate(operator.inputs) if index != position]
            known = {dim for item in (gradient, *others) for dim in self._tensors[item]}
            if not set(dims) <= known:
                raise InvalidArgument(
                    f"the gradient of {name!r} through {operator.output!r} is a broadcast, not an einsum",
                    field="operators",
                    hint="differentiate a graph whose sums have a second factor",
                )
            self._emit(GraphOperator("einsum", (gradient, *others), result), dims)
        elif operator.kind == "add":
            if self._graph.tensors[operator.output] == dims:
                result = gradient
            else:
                self._emit(GraphOperator("einsum", (gradient,), result), dims)
        elif operator.kind == "rename":
            self._emit(GraphOperator("rename", (gradient,), result), dims)
        else:
            self._emit(
                GraphOperator(
                    "map", (gradient, *operator.inputs), result, f"{operator.function}/d{position}", operator.whole
                ),
                dims,
            )
        self._summands.setdefault(name, []).append(result)
