"""The same schedule, exported as CSV, gives the same gradients on torch's own pipeline runtime."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_cases import Case, prepare

from stagewright.formats.torch_csv import torch_csv
from stagewright.planner.errors import InvalidArgument, NotExpressible
from stagewright.planner.planned_schedule import schedule_of
from stagewright.planner.schedules.registry import families

pytestmark = pytest.mark.ranks


FIXED = [
    family for family in families() if family.name != "dynapipe" and not family.not_run
]  # whose order is made for each batch


@pytest.mark.parametrize("family", FIXED, ids=lambda family: family.name)
def test_a_schedule_that_torch_can_express_gives_the_same_gradients_there(rank_pools, family):
    pool = rank_pools(2)
    case = Case(
        family.name, 2, 1 if family.name == "naive" else 4, num_slices=2 if "slices" in family.constraint else 1,
        sequential=True, dtype="float64",
    )  # fmt: skip
    try:
        prepared = prepare(case, pool.next_number())
        torch_csv(schedule_of(prepared.plan.schedule))
    except (InvalidArgument, NotExpressible) as refusal:
        pytest.skip(f"torch cannot express it: {refusal.message}")
    for error in pool.run("on_torchs_own_runtime", prepared):
        assert error <= 1e-10
