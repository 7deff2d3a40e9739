"""The whole matrix of schedules, sizes and dtypes on pools of ranks; the normal run holds a sample in test_schedules."""

from __future__ import annotations

from itertools import product

import pytest

pytest.importorskip("torch")
from runtime_cases import Case, prepare

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.registry import families

pytestmark = [pytest.mark.ranks, pytest.mark.soak]

# Kinds of action that the runtime has no handler for yet.
UNHANDLED = {Kind.EVICT, Kind.LOAD, Kind.OFFLOAD, Kind.RELOAD, Kind.FILL, Kind.R}


def cases() -> list[Case]:
    found = []
    for family, ranks, factor, dtype in product(families(), (2, 4, 8), (1, 2), ("float32", "float64")):
        of_other_models = family.name in ("graphpipe", "distmm", "dynapipe")  # see test_schedules
        if not family.synchronous or family.not_run or of_other_models:
            continue
        sliced = family.name in ("terapipe", "seq1f1b")
        found.append(
            Case(
                family.name,
                ranks,
                1 if family.name == "naive" else ranks * factor,
                num_slices=2 if sliced else 1,
                dropout=0.0 if sliced or family.name == "autopipe" else 0.1,  # halves draw other masks than wholes
                dtype=dtype,
                num_steps=2,
                tied=factor == 1,
            )
        )
    return found


@pytest.mark.parametrize(
    "case", cases(), ids=lambda case: f"{case.schedule}-{case.num_ranks}-{case.num_microbatches}-{case.dtype}"
)
def test_every_synchronous_schedule_equals_one_process(rank_pools, case):
    pool = rank_pools(case.world)
    try:
        prepared = prepare(case, pool.next_number())
    except InvalidArgument as refusal:
        pytest.skip(f"the family refuses these sizes: {refusal.message}")
    kinds = {Kind(kind) for order in prepared.schedule.orders for kind in order[:, 0].tolist()}
    if kinds & UNHANDLED:
        pytest.skip(f"the runtime has no handler for {sorted(kind.name for kind in kinds & UNHANDLED)}")
    limit = 1e-10 if case.dtype == "float64" else 1e-5
    for result in pool.run("gradients_and_weights", prepared):
        assert result.gradients.max_relative_error <= limit, result.gradients
        if case.dtype == "float64":
            assert result.weights.max_relative_error <= limit, result.weights
        assert result.num_live == 0
