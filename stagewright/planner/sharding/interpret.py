"""Running a graph on arrays: whole on one device, and as an SPMD program on every device of a mesh.

The second must give what the first gives, for any strategy: that is the proof of the sharding rules, and the tests ask
for it on random graphs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from stagewright.planner.sharding.layout import Layout, Mesh
from stagewright.planner.sharding.operator_graph import Dims, GraphOperator, OperatorGraph
from stagewright.planner.sharding.redistribution import Step
from stagewright.planner.sharding.spmd import Move, SpmdProgram

Floats = npt.NDArray[np.float64]
Device = tuple[int, ...]
Axes = tuple[int, ...]


def run_whole(graph: OperatorGraph, values: Mapping[str, Floats]) -> dict[str, Floats]:
    """Return every tensor of the graph, computed on one device from the sources' values."""
    found = dict(values)
    for operator in graph.operators:
        found[operator.output] = apply(graph, operator, [found[name] for name in operator.inputs])
    return found


def run_sharded(program: SpmdProgram, values: Mapping[str, Floats], wanted: Mapping[str, Layout]) -> dict[str, Floats]:
    """Return the wanted tensors, put together from all devices' shards after the program ran on each."""
    mesh, graph = program.mesh, program.graph
    held: dict[tuple[str, Layout], dict[Device, Floats]] = {}
    for name in graph.sources:
        held[name, program.layouts[name]] = shard(mesh, program.layouts[name], graph.tensors[name], values[name])
    for instruction in program.instructions:
        if isinstance(instruction, Move):
            shards, layout = held[instruction.tensor, instruction.before], instruction.before
            for step in instruction.steps:
                shards = exchange(mesh, step, graph.tensors[instruction.tensor], shards)
                layout = (*layout[: step.axis], step.after, *layout[step.axis + 1 :])
            held[instruction.tensor, layout] = shards
            continue
        operator, strategy = instruction.operator, instruction.strategy
        inputs = [held[name, layout] for name, layout in zip(operator.inputs, strategy.inputs, strict=True)]
        held[operator.output, strategy.output] = {
            device: apply(graph, operator, [shards[device] for shards in inputs]) for device in _devices(mesh)
        }
    return {name: assemble(mesh, layout, graph.tensors[name], held[name, layout]) for name, layout in wanted.items()}


def apply(graph: OperatorGraph, operator: GraphOperator, inputs: list[Floats]) -> Floats:
    """Return an operator's output for arrays (or shards) of its inputs."""
    output = graph.tensors[operator.output]
    if operator.kind == "rename":
        return inputs[0]
    if operator.kind == "einsum":
        letters = {dim: index for index, dim in enumerate(graph.dims_of(operator))}
        operands: list[object] = []
        for name, array in zip(operator.inputs, inputs, strict=True):
            operands += [array, [letters[dim] for dim in graph.tensors[name]]]
        return np.asarray(np.einsum(*operands, [letters[dim] for dim in output]), dtype=np.float64)  # type: ignore[call-overload]
    if operator.kind == "add":
        return np.asarray(
            sum(
                _broadcast(array, graph.tensors[name], output)
                for name, array in zip(operator.inputs, inputs, strict=True)
            )
        )
    axes = tuple(output.index(dim) for dim in operator.whole)
    return FUNCTIONS[operator.function](axes, *inputs)


def shard(mesh: Mesh, layout: Layout, dims: Dims, array: Floats) -> dict[Device, Floats]:
    """Return each device's part of a tensor; a partial axis holds all of it on its first device, zeros elsewhere."""
    parts = {}
    for device in _devices(mesh):
        part = array
        for axis, placement in enumerate(layout):
            if placement.kind == "split":
                part = np.split(part, mesh.sizes[axis], axis=dims.index(placement.dim))[device[axis]]
            elif placement.kind == "partial" and device[axis]:
                part = np.zeros_like(part)
        parts[device] = part
    return parts


def assemble(mesh: Mesh, layout: Layout, dims: Dims, shards: Mapping[Device, Floats]) -> Floats:
    """Return the whole tensor from all shards.

    Raises
    ------
    ValueError : when two devices that should hold the same numbers do not.
    """
    parts = dict(shards)
    for axis in reversed(range(len(mesh.axes))):
        placement = layout[axis]
        for device in [device for device in parts if device[axis] == 0]:
            group = [parts[_at(device, axis, index)] for index in range(mesh.sizes[axis])]
            if placement.kind == "split":
                parts[device] = np.concatenate(group, axis=dims.index(placement.dim))
            elif placement.kind == "partial":
                parts[device] = np.asarray(sum(group))
            elif not all(np.allclose(part, group[0]) for part in group):
                raise ValueError(f"devices along {mesh.axes[axis]} hold different copies")
        parts = {device: part for device, part in parts.items() if device[axis] == 0}
    return parts[(0,) * len(mesh.axes)]


def exchange(mesh: Mesh, step: Step, dims: Dims, shards: Mapping[Device, Floats]) -> dict[Device, Floats]:
    """Return every device's part after a collective along one axis."""
    size = mesh.sizes[step.axis]
    result = {}
    for device, part in shards.items():
        if step.before.kind == "replicated":
            whole = part
        elif step.before.kind == "split" and step.after.kind == "partial":
            zeros = [np.zeros_like(part)] * size
            zeros[device[step.axis]] = part
            result[device] = np.concatenate(zeros, axis=dims.index(step.before.dim))
            continue
        else:
            group = [shards[_at(device, step.axis, index)] for index in range(size)]
            if step.before.kind == "split":
                whole = np.concatenate(group, axis=dims.index(step.before.dim))
            else:
                whole = np.asarray(sum(group))
        if step.after.kind == "split":
            whole = np.split(whole, size, axis=dims.index(step.after.dim))[device[step.axis]]
        elif step.after.kind == "partial" and device[step.axis]:
            whole = np.zeros_like(whole)
        result[device] = whole
    return result


def _devices(mesh: Mesh) -> list[Device]:
    return list(itertools.product(*(range(size) for size in mesh.sizes)))


def _at(device: Device, axis: int, index: int) -> Device:
    return (*device[:axis], index, *device[axis + 1 :])


def _broadcast(array: Floats, dims: Dims, output: Dims) -> Floats:
    order = [dims.index(dim) for dim in output if dim in dims]
    shape = tuple(array.shape[dims.index(dim)] if dim in dims else 1 for dim in output)
    return array.transpose(order).reshape(shape)


# ---- functions of maps: each takes the axes read together, then its inputs; `f/d0` is the gradient for input 0 -----------


def _gelu(_: Axes, x: Floats) -> Floats:
    return np.asarray(0.5 * x * (1.0 + np.tanh(_GELU * (x + 0.044715 * x**3))))


def _gelu_gradient(_: Axes, gradient: Floats, x: Floats) -> Floats:
    inner = np.tanh(_GELU * (x + 0.044715 * x**3))
    slope = 0.5 * (1.0 + inner) + 0.5 * x * (1.0 - inner**2) * _GELU * (1.0 + 3 * 0.044715 * x**2)
    return np.asarray(gradient * slope)


def _softmax(axes: Axes, x: Floats) -> Floats:
    raised = np.exp(x - x.max(axis=axes, keepdims=True))
    return np.asarray(raised / raised.sum(axis=axes, keepdims=True))


def _softmax_gradient(axes: Axes, gradient: Floats, x: Floats) -> Floats:
    y = _softmax(axes, x)
    return np.asarray(y * (gradient - (gradient * y).sum(axis=axes, keepdims=True)))


def _norm(axes: Axes, x: Floats) -> Floats:
    return np.asarray(x / np.sqrt((x**2).mean(axis=axes, keepdims=True) + _EPSILON))


def _norm_gradient(axes: Axes, gradient: Floats, x: Floats) -> Floats:
    scale = 1.0 / np.sqrt((x**2).mean(axis=axes, keepdims=True) + _EPSILON)
    return np.asarray(scale * gradient - scale**3 * x * (gradient * x).mean(axis=axes, keepdims=True))


_GELU = math.sqrt(2.0 / math.pi)
_EPSILON = 1e-6

FUNCTIONS: dict[str, Callable[..., Floats]] = {
    "gelu": _gelu,
    "gelu/d0": _gelu_gradient,
    "softmax": _softmax,
    "softmax/d0": _softmax_gradient,
    "rms-norm": _norm,
    "rms-norm/d0": _norm_gradient,
}
