"""What moving a tensor between layouts takes and costs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.sharding.interpret import assemble, exchange, shard
from stagewright.planner.sharding.layout import PARTIAL, REPLICATED, Mesh, fits, split, text
from stagewright.planner.sharding.redistribution import redistribute

SIZES = {"i": 8, "j": 16}
DIMS = ("i", "j")


def steps(mesh, before, after, size_bytes=128.0):
    return redistribute(mesh, before, after, dims=DIMS, sizes=SIZES, size_bytes=size_bytes)


@pytest.mark.parametrize(
    ("before", "after", "kind", "share"),
    [
        (split("i"), REPLICATED, "all-gather", 3 / 4),
        (PARTIAL, REPLICATED, "all-reduce", 2 * 3 / 4),
        (PARTIAL, split("j"), "reduce-scatter", 3 / 4),
        (split("i"), split("j"), "all-to-all", 3 / 16),
        (REPLICATED, split("i"), "local", 0.0),
        (REPLICATED, PARTIAL, "local", 0.0),
        (split("i"), PARTIAL, "local", 0.0),
    ],
    ids=str,
)
def test_one_axis_costs_what_oneflows_boxing_table_says(before, after, kind, share):
    """n = 4: S->B (n-1)/n, P->B 2(n-1)/n, P->S (n-1)/n, S->S (n-1)/n^2 of the tensor sent by each device."""
    (step,) = steps(Mesh.of({"x": 4}), (before,), (after,))
    assert step.kind == kind
    assert step.sent_bytes == pytest.approx(share * 128.0)


def test_an_axis_exchanges_only_what_the_other_axis_left_it():
    mesh = Mesh.of({"x": 2, "y": 4})
    (step,) = steps(mesh, (split("i"), PARTIAL), (split("i"), REPLICATED))
    assert (step.axis, step.kind, step.group_bytes) == (1, "all-reduce", 64.0)


def test_the_later_cut_of_a_dimension_is_gathered_before_the_earlier_one():
    mesh = Mesh.of({"x": 2, "y": 2})
    taken = steps(mesh, (split("i"), split("i")), (REPLICATED, split("i")))
    assert [(step.axis, step.kind) for step in taken] == [(1, "all-gather"), (0, "all-gather"), (1, "local")]


def test_every_pair_of_layouts_moves_the_numbers_where_they_belong():
    """All 16 x 16 layouts of a matrix on a 2 x 2 mesh, run on arrays."""
    mesh = Mesh.of({"x": 2, "y": 2})
    array = np.random.default_rng(0).standard_normal((8, 16))
    layouts = list(itertools.product([split("i"), split("j"), REPLICATED, PARTIAL], repeat=2))
    assert all(fits(mesh, layout, DIMS, SIZES) for layout in layouts)
    for before, after in itertools.product(layouts, repeat=2):
        shards, layout = shard(mesh, before, DIMS, array), before
        for step in steps(mesh, before, after):
            shards = exchange(mesh, step, DIMS, shards)
            layout = (*layout[: step.axis], step.after, *layout[step.axis + 1 :])
        assert layout == after
        np.testing.assert_allclose(assemble(mesh, after, DIMS, shards), array, err_msg=f"{text(before)} {text(after)}")
        held = shard(mesh, after, DIMS, array)
        assert {device: part.shape for device, part in shards.items()} == {d: part.shape for d, part in held.items()}


def test_a_layout_that_does_not_divide_is_refused_with_its_sizes():
    with pytest.raises(InvalidArgument, match=r"\[S\(i\)\] does not divide a tensor of \{'i': 8, 'j': 16\}"):
        steps(Mesh.of({"x": 3}), (split("i"),), (REPLICATED,))
