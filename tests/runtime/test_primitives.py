"""A plan as primitives on a module (Slapo), each verified numerically."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from rank_pool import RankError
from runtime_cases import Case, prepare
from runtime_models import TinyModel

from stagewright.modeling import split
from stagewright.planner.errors import InvalidArgument
from stagewright.runtime.primitives import steps_of, texts_of, verify_steps

pytestmark = pytest.mark.ranks

SIZES = {"num_chunks": 1, "dropout": 0.0, "dtype": "float64", "num_blocks": 3}


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"tp": 2, "sp": True}, {"tp": 2, "vocab_parallel": True}], ids=str)
def test_every_primitive_of_a_plan_leaves_loss_and_gradients_as_they_were(rank_pools, degrees):
    pool = rank_pools(4)
    case = Case("1f1b", 2, 2, degrees=degrees, recompute=("full",), **SIZES)
    prepared = prepare(case, pool.next_number())
    for found in pool.run("primitive_cases.verified", prepared):
        kinds = [kind for kind, *_ in found]
        blocks = 1 if degrees.get("sp") else 3
        vocabulary = 1 if degrees.get("vocab_parallel") else 0
        assert kinds.count("shard") == blocks + vocabulary
        assert kinds.count("checkpoint") >= 3
        assert kinds.count("pipeline_split") == 1
        assert sorted(kinds, key=["shard", "checkpoint", "pipeline_split"].index) == kinds
        assert max(error for *_, error in found) <= 1e-9
        assert sum(count for kind, _, count, _ in found if kind == "shard") >= 8 * 3


def test_the_primitive_that_changes_the_result_is_named(rank_pools):
    pool = rank_pools(4)
    prepared = prepare(Case("1f1b", 2, 2, degrees={"tp": 2}, **SIZES), pool.next_number())
    with pytest.raises(RankError, match=r'after \["blocks\.1\.attention\.inputs"\]\.shard.* differs by'):
        pool.run("primitive_cases.verified_with_heads_apart", prepared)


def test_a_plan_is_written_as_slapo_would_write_it():
    plan = prepare(Case("1f1b", 2, 2, degrees={"tp": 2}, recompute=("full",), **SIZES), 0).plan
    chain = split(TinyModel(3, dropout=0.0))
    lines = texts_of(steps_of(plan, chain))
    assert lines[:4] == [
        '["blocks.0.attention.inputs"].shard(["weight", "bias"], axis=0)',
        '["blocks.0.attention.inputs"].sync("backward", "all-reduce")',
        '["blocks.0.attention.output"].shard("weight", axis=1)',
        '["blocks.0.attention.output"].sync("forward", "all-reduce")',
    ]
    assert '["blocks.1"].checkpoint("full")' in lines
    assert lines[-1].endswith(".pipeline_split()")
    with pytest.raises(InvalidArgument, match=r"tp = 2, the group 1 ranks"):
        verify_steps(plan, chain, (None, None))
