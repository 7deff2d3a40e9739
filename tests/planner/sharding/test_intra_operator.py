"""The integer programme over a layer's strategies: exact, and it finds what people found by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from stagewright.planner.errors import Infeasible
from stagewright.planner.sharding import REPLICATED, GraphBuilder, Mesh, split, with_backward
from stagewright.planner.sharding.interpret import run_sharded, run_whole
from stagewright.planner.sharding.intra_operator import LayerProblem, brute_force, shard_layer
from stagewright.planner.sharding.layer_graphs import mlp_graph, transformer_graph
from stagewright.planner.sharding.spmd import Move


def test_a_perceptron_block_on_four_devices_is_split_by_column_then_by_row():
    """Alpa's check: with no room for whole weights, one all-reduce in the forward (Megatron-LM)."""
    mesh, graph = Mesh.of({"tp": 4}), mlp_graph(batch=1, sequence=2048, hidden=4096, ffn=16384)
    whole = dict.fromkeys(("x", "down"), mesh.replicated)
    room = 0.3 * 2 * graph.size_bytes("w1") + graph.size_bytes("x")
    found = shard_layer(LayerProblem(mesh, graph, whole, price_per_flop=1e-3, memory_bytes=room))
    assert (found.homes["w1"], found.homes["w2"]) == ((split("f"),), (split("f"),))
    assert dict(found.program.collectives()) == {("tp", "all-reduce"): 1}
    assert found.bound == pytest.approx(found.cost)


def test_a_transformer_layer_with_its_backward_is_split_as_megatron_splits_it():
    mesh = Mesh.of({"tp": 4})
    graph = with_backward(transformer_graph(batch=1, sequence=2048, hidden=4096, heads=32, ffn=16384))
    whole = dict.fromkeys(("x", "out", "d_out"), mesh.replicated)
    states = 8 * sum(graph.size_bytes(name) for name in graph.parameters)
    problem = LayerProblem(mesh, graph, whole, price_per_flop=1e-3, memory_bytes=0.35 * states + 2e9, source_states=8)
    found = shard_layer(problem)
    assert {name: found.homes[name] for name in graph.parameters} == {
        **dict.fromkeys(("wq", "wk", "wv", "wo"), (split("n"),)),
        **dict.fromkeys(("w1", "w2"), (split("f"),)),
    }
    bsh = graph.size_bytes("x")
    assert found.program.sent_bytes() == pytest.approx(8 * 3 / 4 * bsh)  # O19: 8 (t-1)/t bsh, forward and backward


def test_a_large_batch_and_small_weights_are_data_parallel():
    mesh = Mesh.of({"x": 2})
    graph = with_backward(mlp_graph(batch=64, sequence=64, hidden=16, ffn=32))
    found = shard_layer(LayerProblem(mesh, graph, {"x": (split("b"),), "d_down": (split("b"),)}, price_per_flop=1e-3))
    moved = {item.tensor for item in found.program.instructions if isinstance(item, Move)}
    assert not [name for name in moved if "b" in graph.tensors[name]]
    weights = graph.size_bytes("w1") + graph.size_bytes("w2")
    assert found.program.sent_bytes() == pytest.approx(2 * 1 / 2 * weights)  # an all-reduce, or its two halves


def test_no_room_is_said_with_both_numbers():
    mesh, graph = Mesh.of({"x": 2}), mlp_graph(batch=2, sequence=2, hidden=4, ffn=8)
    with pytest.raises(Infeasible, match=r"no strategy fits 10 bytes; the least of each tensor adds up to 80"):
        shard_layer(LayerProblem(mesh, graph, {}, memory_bytes=10.0))


def random_problem(seed: int) -> LayerProblem:
    """Return a chain or a fork of up to three operators on two devices, memory sometimes binding."""
    draw = random.Random(seed)
    sizes = {dim: draw.choice([2, 4, 8, 32]) for dim in "bhfg"}
    builder = GraphBuilder(sizes)
    x = builder.input("x", "b", "h")
    first = builder.einsum("first", [x, builder.parameter("w1", "h", "f")], "b", "f")
    if draw.random() < 0.5:
        out = builder.einsum("out", [builder.map("a", "gelu", [first]), builder.parameter("w2", "f", "g")], "b", "g")
    else:
        out = builder.add("out", [first, builder.einsum("second", [x, builder.parameter("w2", "h", "f")], "b", "f")])
    graph = builder.graph(out)
    mesh = Mesh.of({"x": 2})
    fixed = {"x": (draw.choice([split("b"), split("h"), REPLICATED]),)} if draw.random() < 0.7 else {}
    if draw.random() < 0.5:
        fixed[out] = (draw.choice([split("b"), REPLICATED]),)
    states = sum(graph.size_bytes(name) for name in graph.sources)
    room = draw.choice([float("inf"), states * draw.uniform(0.5, 1.1)])
    return LayerProblem(mesh, graph, fixed, price_per_flop=draw.choice([0.0, 0.1, 1.0]), memory_bytes=room)


@pytest.mark.parametrize("seed", range(40))
def test_the_integer_programme_equals_brute_force(seed):
    problem = random_problem(seed)
    best = brute_force(problem)
    if best == float("inf"):
        with pytest.raises(Infeasible):
            shard_layer(problem)
        return
    found = shard_layer(problem)
    assert found.cost == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert found.memory_bytes <= problem.memory_bytes * (1 + 1e-9)
    values = {
        name: np.random.default_rng(seed).standard_normal([problem.graph.sizes[d] for d in problem.graph.tensors[name]])
        for name in problem.graph.sources
    }
    (output,) = problem.graph.outputs
    lies = {output: problem.fixed.get(output, found.program.layouts[output])}
    sharded = run_sharded(found.program, values, lies)[output]
    np.testing.assert_allclose(sharded, run_whole(problem.graph, values)[output], rtol=1e-9, atol=1e-9)
