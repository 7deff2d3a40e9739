"""Systems that stand on the sharding algebra: HyPar, one weird trick, Tofu, Unity, Automap, AutoDDL."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest

from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.sharding import GraphBuilder, Mesh, split, with_backward
from stagewright.planner.sharding.automap import automap
from stagewright.planner.sharding.hypar import ChainLayer, hypar, inter_elements, intra_elements, one_level
from stagewright.planner.sharding.interpret import run_whole
from stagewright.planner.sharding.intra_operator import LayerProblem, shard_layer
from stagewright.planner.sharding.layer_graphs import mlp_graph, transformer_graph
from stagewright.planner.sharding.propagation import partition
from stagewright.planner.sharding.spmd import Move
from stagewright.planner.sharding.substitutions import best_first, substitutions
from stagewright.planner.sharding.tofu import halvings, tofu

FC = ChainLayer("fc", 4096 * 4096, 32 * 4096, 32 * 4096)
CONV = ChainLayer("conv", 256 * 256 * 9, 32 * 256 * 56 * 56, 32 * 256 * 56 * 56)


def test_hypar_derives_the_papers_table_of_transitions():
    layer = ChainLayer("l", 7.0, 8.0, 8.0)
    table = {pair: inter_elements(layer, *pair) for pair in itertools.product(("dp", "mp"), repeat=2)}
    assert table == {("dp", "dp"): 0.0, ("dp", "mp"): 8 / 4 + 8 / 4, ("mp", "mp"): 8 / 2, ("mp", "dp"): 8 / 2}
    assert (intra_elements(layer, "dp"), intra_elements(layer, "mp")) == (7.0, 8.0)


def test_hypar_chooses_model_parallelism_for_fully_connected_layers_and_data_parallelism_for_convolutions():
    assert one_level([FC])[0] == ("mp",)
    assert (intra_elements(FC, "dp"), intra_elements(FC, "mp")) == (16_777_216, 131_072)
    assert one_level([CONV])[0] == ("dp",)


def test_one_weird_trick_is_what_hypar_answers_on_alexnet():
    """Elements of AlexNet at a batch of 128: five convolutions, three fully connected layers."""
    shapes = [
        ("conv1", 3 * 96 * 121, 3 * 224 * 224, 96 * 27 * 27),
        ("conv2", 96 * 256 * 25, 96 * 27 * 27, 256 * 13 * 13),
        ("conv3", 256 * 384 * 9, 256 * 13 * 13, 384 * 13 * 13),
        ("conv4", 384 * 384 * 9, 384 * 13 * 13, 384 * 13 * 13),
        ("conv5", 384 * 256 * 9, 384 * 13 * 13, 256 * 6 * 6),
        ("fc6", 256 * 36 * 4096, 256 * 36, 4096),
        ("fc7", 4096 * 4096, 4096, 4096),
        ("fc8", 4096 * 1000, 4096, 1000),
    ]
    layers = [ChainLayer(name, weights, 128 * left, 128 * right) for name, weights, left, right in shapes]
    answer = hypar(layers, 4)
    assert all(level == ("dp",) * 5 + ("mp",) * 3 for level in answer.levels)


def test_hypars_level_equals_exhaustive_search():
    random = np.random.default_rng(0)
    for _ in range(20):
        layers = [ChainLayer(str(i), *random.uniform(1, 100, 3)) for i in range(6)]
        _, elements = one_level(layers)
        best = min(
            sum(intra_elements(layer, choice) for layer, choice in zip(layers, choices, strict=True))
            + sum(inter_elements(layers[i], choices[i], choices[i + 1]) for i in range(5))
            for choices in itertools.product(("dp", "mp"), repeat=6)
        )
        assert elements == pytest.approx(best)


def test_devices_that_cannot_be_halved_are_refused():
    for solve in (lambda: hypar([FC], 6), lambda: tofu(mlp_graph(batch=2, sequence=2, hidden=4, ffn=4), 6)):
        with pytest.raises(InvalidArgument, match="6 devices cannot be halved"):
            solve()


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_tofus_recursion_costs_what_the_joint_division_costs(batch):
    graph = with_backward(mlp_graph(batch=batch, sequence=8, hidden=64, ffn=128))
    answer = tofu(graph, 4)
    joint = shard_layer(LayerProblem(halvings(2), graph, {}, divides_everything=True))
    assert answer.sharding.cost == pytest.approx(joint.cost)
    assert sum(answer.step_bytes) == pytest.approx(answer.sharding.cost)
    assert all(strategy.num_workers == 4 for strategy in answer.sharding.chosen)
    shards = [answer.sharding.homes[name] for name in graph.parameters]
    assert all(placement.kind == "split" for layout in shards for placement in layout)


def two_branches(batch=4):
    """Return x w1 + x w2, then an activation: what fusing two linear layers is for."""
    builder = GraphBuilder({"b": batch, "h": 8, "f": 16, "g": 8})
    x = builder.input("x", "b", "h")
    parts = [builder.einsum(f"part{i}", [x, builder.parameter(f"w{i}", "h", "f")], "b", "f") for i in (1, 2)]
    active = builder.map("active", "gelu", [builder.add("total", parts)])
    middle = builder.einsum("middle", [active, builder.parameter("w3", "f", "g")], "b", "g")
    first = builder.einsum("first", [middle, builder.parameter("w4", "g", "h")], "b", "h")
    return builder.graph(builder.add("out", [builder.add("skip", [first, x]), x]))


def reached(graph, depth):
    found = [((), graph)]
    for _ in range(depth):
        found += [((*names, name), after) for names, before in found for name, after in substitutions(before)]
    return found


def test_every_substitution_keeps_what_the_graph_and_its_gradients_compute():
    graph = two_branches()
    random = np.random.default_rng(0)
    values = {name: random.standard_normal([graph.sizes[d] for d in graph.tensors[name]]) for name in graph.sources}
    values["d_out"] = random.standard_normal([4, 8])
    whole = with_backward(graph)
    expected = run_whole(whole, values)
    seen = set()
    for names, rewritten in reached(graph, 2):
        seen.update(names)
        after = with_backward(rewritten)
        result = run_whole(after, values)
        np.testing.assert_allclose(result["out"], expected["out"], rtol=1e-9)
        for name, gradient in whole.gradients.items():
            np.testing.assert_allclose(result[after.gradients[name]], expected[gradient], rtol=1e-8, atol=1e-9)
    assert seen == {"fuse linears", "reassociate", "merge additions"}


def test_two_products_with_one_weight_become_one():
    builder = GraphBuilder({"b": 4, "h": 8, "f": 16})
    x, y, w = builder.input("x", "b", "h"), builder.input("y", "b", "h"), builder.parameter("w", "h", "f")
    graph = builder.graph(
        builder.add("out", [builder.einsum("xw", [x, w], "b", "f"), builder.einsum("yw", [y, w], "b", "f")])
    )
    ((name, after),) = substitutions(graph)
    random = np.random.default_rng(0)
    values = {name: random.standard_normal([graph.sizes[d] for d in graph.tensors[name]]) for name in graph.sources}
    assert name == "fuse inputs"
    np.testing.assert_allclose(run_whole(after, values)["out"], run_whole(graph, values)["out"])


def test_fusing_two_linears_is_taken_because_it_halves_the_gradients_to_sum():
    mesh, graph = Mesh.of({"dp": 4}), two_branches(batch=1024)

    def problem(candidate):
        batch = {"x": (split("b"),), "out": (split("b"),), "d_out": (split("b"),)}
        return LayerProblem(mesh, candidate, {name: batch[name] for name in batch if name in candidate.tensors})

    plain = shard_layer(problem(with_backward(graph)))
    found = best_first(graph, problem)
    assert "fuse linears" in found.names
    assert found.sharding.cost < plain.cost


def test_automap_recovers_megatrons_split_from_few_annotations():
    graph = with_backward(transformer_graph(batch=2, sequence=256, hidden=1024, heads=16, ffn=4096))
    mesh = Mesh.of({"tp": 4})
    prices = {"price_per_flop": 1e-2, "price_per_held_byte": 10.0}
    found = automap(mesh, graph, "tp", budget=60, seed=0, **prices)
    megatron, _ = partition(mesh, graph, {"w1": {"tp": split("f")}, "wq": {"tp": split("n")}})
    assert len(found.annotations) <= 3
    assert found.program.collectives() == megatron.collectives()
    assert found.program.sent_bytes() == pytest.approx(megatron.sent_bytes())
    again = automap(mesh, graph, "tp", budget=60, seed=0, **prices)
    assert (again.annotations, again.cost) == (found.annotations, found.cost)


@pytest.mark.parametrize(("rows", "weights_move"), [(1024, True), (8, False)])
def test_autoddl_moves_weights_and_activations_where_they_weigh_the_same(rows, weights_move):
    """X [rows, 1024] W [1024, 1024] on 16 devices, everything divided: a grid of 4 x 4 beats one axis of 16."""
    builder = GraphBuilder({"b": rows, "h": 1024, "f": 1024})
    product = builder.einsum("y", [builder.input("x", "b", "h"), builder.parameter("w", "h", "f")], "b", "f")
    graph = builder.graph(product)

    def cheapest(mesh):
        found = []
        for home in itertools.product([split("b"), split("f")], repeat=len(mesh.axes)):
            inputs = tuple(split("b") if placement == split("b") else split("h") for placement in home)
            with contextlib.suppress(Infeasible, InvalidArgument):
                found.append(shard_layer(LayerProblem(mesh, graph, {"x": inputs, "y": home}, divides_everything=True)))
        return min(found, key=lambda item: item.cost)

    line, grid = cheapest(Mesh.of({"p": 16})), cheapest(Mesh.of({"q": 4, "r": 4}))
    assert grid.cost < 0.9 * line.cost
    moved = {item.tensor for item in grid.program.instructions if isinstance(item, Move)}
    assert ("w" in moved) == weights_move
