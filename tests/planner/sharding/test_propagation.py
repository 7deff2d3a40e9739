"""From a few annotations to the collectives of a training step: Megatron, sequence parallelism, ZeRO-3, Mesh-TensorFlow."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.sharding import Mesh, partition, propagate, split, with_backward
from stagewright.planner.sharding.interpret import run_sharded, run_whole
from stagewright.planner.sharding.layer_graphs import mlp_graph, transformer_graph
from stagewright.planner.sharding.layout_rules import annotations_of

LAYER = with_backward(transformer_graph(batch=8, sequence=64, hidden=16, heads=4, ffn=32))
MESH = Mesh.of({"dp": 2, "tp": 2})
BATCH = {"x": {"dp": split("b")}, "d_out": {"dp": split("b")}}
TENSOR = {"w1": {"tp": split("f")}, "wq": {"tp": split("n")}}
SEQUENCE = {name: {"tp": split("s")} for name in ("x", "norm1", "middle", "out", "d_out")}
STATES = {name: {"dp": split("h")} for name in ("wq", "wk", "wv", "wo", "w1", "w2")}


def counts(*tactics, **options):
    program, _ = partition(MESH, LAYER, *tactics, **options)
    return [
        {f"{axis} {kind}": number for (axis, kind), number in program.collectives(backward=half).items()}
        for half in (False, True)
    ]


def test_two_annotations_give_megatrons_two_all_reduces_each_way():
    assert counts(BATCH, TENSOR) == [{"tp all-reduce": 2}, {"tp all-reduce": 2, "dp all-reduce": 6}]


def test_sequence_parallelism_turns_each_all_reduce_into_a_gather_and_a_scatter():
    assert counts(BATCH, TENSOR, SEQUENCE) == [
        {"tp all-gather": 2, "tp reduce-scatter": 2},
        {"tp all-gather": 2, "tp reduce-scatter": 2, "dp all-reduce": 6},
    ]


def test_zero_3_gathers_each_weight_twice_and_scatters_each_gradient_once():
    assert counts(BATCH, STATES, keep_gathered=False) == [
        {"dp all-gather": 6},
        {"dp all-gather": 6, "dp reduce-scatter": 6},
    ]


def test_batch_tensor_and_state_tactics_compose_in_order():
    """PartIR's example: [batch: DP, weights: TP, parameters: Z3]."""
    assert counts(BATCH, TENSOR, STATES) == [
        {"tp all-reduce": 2, "dp all-gather": 6},
        {"tp all-reduce": 2, "dp reduce-scatter": 6},
    ]


def test_a_tactic_against_an_earlier_one_is_a_conflict_and_the_earlier_one_stands():
    """The activation is split by features first; a split by positions on the same axis cannot reach it."""
    found = propagate(MESH, LAYER, TENSOR, SEQUENCE)
    assert ("up", "tp") in found.conflicts
    assert found.layouts["up"][1] == split("f")
    assert not propagate(MESH, LAYER, BATCH, TENSOR).conflicts


def test_propagation_fills_every_tensor_of_attention_and_perceptron():
    """GSPMD: from two weights, every head and every hidden unit is split, forward and backward."""
    found = propagate(Mesh.of({"tp": 2}), LAYER, TENSOR)
    for name, dims in LAYER.tensors.items():
        expected = {split("n")} if "n" in dims else {split("f")} if "f" in dims else None
        if expected:
            assert set(found.layouts[name]) == expected, name
    assert found.num_inferred >= 20


@pytest.mark.parametrize(
    "tactics", [(TENSOR,), (BATCH, TENSOR), (BATCH, TENSOR, SEQUENCE), (BATCH, STATES), (SEQUENCE,)], ids=len
)
def test_the_program_computes_what_one_device_computes(tactics):
    program, found = partition(MESH, LAYER, *tactics)
    random = np.random.default_rng(1)
    values = {name: random.standard_normal([LAYER.sizes[dim] for dim in LAYER.tensors[name]]) for name in LAYER.sources}
    wanted = {gradient: found.layouts[name] for name, gradient in LAYER.gradients.items()}
    wanted["out"] = found.layouts["out"]
    whole, sharded = run_whole(LAYER, values), run_sharded(program, values, wanted)
    for name in wanted:
        np.testing.assert_allclose(sharded[name], whole[name], rtol=1e-9, atol=1e-9, err_msg=name)


def test_the_gradients_are_those_of_finite_differences():
    graph = with_backward(transformer_graph(batch=1, sequence=3, hidden=4, heads=2, ffn=6))
    random = np.random.default_rng(2)
    values = {name: random.standard_normal([graph.sizes[dim] for dim in graph.tensors[name]]) for name in graph.sources}
    whole = run_whole(graph, values)
    for name, gradient in graph.gradients.items():
        direction = random.standard_normal(values[name].shape)
        ends = [run_whole(graph, {**values, name: values[name] + sign * 1e-5 * direction})["out"] for sign in (1, -1)]
        slope = float(((ends[0] - ends[1]) * values["d_out"]).sum() / 2e-5)
        assert float((whole[gradient] * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_mesh_tensorflow_rules_give_the_collectives_of_the_hand_made_plan():
    """("b", "x"), ("f", "y") on an MLP: one all-reduce along y each way, weight gradients summed along x."""
    graph = with_backward(mlp_graph(batch=8, sequence=64, hidden=16, ffn=32))
    mesh = Mesh.of({"x": 2, "y": 2})
    program, found = partition(mesh, graph, annotations_of(mesh, graph, [("b", "x"), ("f", "y")]))
    by_hand = {"x": {"x": split("b")}, "d_down": {"x": split("b")}, "w1": {"y": split("f")}, "w2": {"y": split("f")}}
    assert program.collectives() == partition(mesh, graph, by_hand)[0].collectives()
    assert dict(program.collectives(backward=False)) == {("y", "all-reduce"): 1}
    assert dict(program.collectives(backward=True)) == {("y", "all-reduce"): 1, ("x", "all-reduce"): 2}
    assert not found.conflicts


def test_one_axis_cannot_split_two_dimensions_of_a_tensor():
    graph = mlp_graph(batch=8, sequence=64, hidden=16, ffn=32)
    with pytest.raises(InvalidArgument, match="axis x splits both 'h' and 'f' of tensor 'w1'"):
        annotations_of(Mesh.of({"x": 2}), graph, [("h", "x"), ("f", "x")])
