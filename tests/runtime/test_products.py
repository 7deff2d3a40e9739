"""Products of the parallel degrees on four and eight ranks: gradients and weights are those of one process.

Every pair of degrees on four ranks and on eight, each with every ZeRO stage, and pipeline x data x tensor on eight. The normal
run holds a sample that covers every pair of degrees once.
"""

from __future__ import annotations

from itertools import combinations

import pytest

pytest.importorskip("torch")
from runtime_cases import Case
from test_schedules import assert_equal_to_one_process

pytestmark = pytest.mark.ranks

DEFAULTS = {"zero": 0, "sp": False}
NUM_HEADS = 4
AXES = ("pp", "dp", "tp", "cp", "ep")


def case_of(sizes: dict[str, int], *, zero: int = 0, sp: bool = False, ulysses: bool = False) -> Case | None:
    """The case of some sizes, 1 where none is given; None for what means nothing."""
    degrees = {axis: sizes.get(axis, 1) for axis in ("dp", "tp", "cp", "ep")}
    if zero and degrees["dp"] * degrees["cp"] == 1:
        return None
    width = degrees["dp"] * degrees["tp"] * degrees["cp"]
    if degrees["ep"] > 1 and width % degrees["ep"]:
        return None
    if ulysses and NUM_HEADS // degrees["tp"] % degrees["cp"]:
        return None
    degrees |= {"zero": zero, "sp": sp, "ulysses": degrees["cp"] if ulysses else 1}
    ranks = sizes.get("pp", 1)
    return Case(
        "1f1b" if ranks > 1 else "gpipe",
        ranks,
        ranks + 1,
        degrees=degrees,
        dropout=0.0,
        dtype="float64",
        num_steps=2,
        num_blocks=max(3, ranks),
        num_choices=2 if degrees["ep"] > 1 else 0,
    )


def pairs(world: int) -> list[Case]:
    """Every pair of degrees that multiply to `world`, with every ZeRO stage; ep covers replicas, so it adds no ranks."""
    found: list[Case | None] = []
    for first, second in combinations(AXES, 2):
        for size in (2, 4):
            other = world // size
            sizes = {first: size, second: other}
            if "ep" in sizes and first != "ep":
                sizes = {"dp": world // sizes[first], **sizes} if first != "dp" else {"dp": world, "ep": min(4, other)}
            for zero in range(4):
                found.append(case_of(sizes, zero=zero))
            if "tp" in sizes:
                found.append(case_of(sizes, sp=True))
            if "cp" in sizes and sizes["cp"] <= 4:
                found.append(case_of(sizes, ulysses=True))
    return [case for case in found if case is not None and 1 < case.world <= world and max(sizes_of(case)) <= 4]


def sizes_of(case: Case) -> tuple[int, ...]:
    return case.num_ranks, case.degrees["tp"], case.degrees["cp"], case.degrees["ep"]


def triples() -> list[Case]:
    """Pipeline x data x tensor, pipeline x ZeRO x tensor and their like on eight ranks."""
    found = [
        case_of({"pp": 2, first: 2, second: 2}, zero=zero, sp=sp)
        for first, second in combinations(("dp", "tp", "cp"), 2)
        for zero in range(4)
        for sp in ((False, True) if "tp" in (first, second) else (False,))
    ]
    found += [case_of({"pp": 2, "dp": 2, "tp": 2, "ep": ep}, zero=zero) for ep in (2, 4) for zero in range(4)]
    return [case for case in found if case is not None]


def distinct(cases: list[Case]) -> list[Case]:
    return list({case_id(case): case for case in cases}.values())


def case_id(case: Case) -> str:
    told = {name: value for name, value in case.degrees.items() if value != DEFAULTS.get(name, 1)}
    return "-".join((f"pp{case.num_ranks}", *(f"{name}{int(value)}" for name, value in told.items())))


SAMPLE = distinct(
    [
        case
        for case in (
            case_of({"pp": 2, "dp": 2, "tp": 2}, sp=True, zero=1),
            case_of({"pp": 2, "dp": 2, "cp": 2}, zero=3),
            case_of({"dp": 2, "tp": 2, "cp": 2}, zero=2),
            case_of({"pp": 2, "tp": 2, "cp": 2}),
            case_of({"pp": 2, "dp": 2, "tp": 2, "ep": 4}, zero=1),
            case_of({"pp": 2, "dp": 2, "tp": 2, "ep": 2}, zero=2),
            case_of({"dp": 2, "cp": 2, "ep": 4}),
        )
        if case is not None
    ]
)
WHOLE = distinct([*pairs(4), *pairs(8), *triples()])


@pytest.mark.parametrize("case", SAMPLE, ids=case_id)
def test_a_sample_of_products_equals_one_process(rank_pools, case):
    assert_equal_to_one_process(rank_pools, case)


@pytest.mark.soak
@pytest.mark.parametrize("case", WHOLE, ids=case_id)
def test_every_product_equals_one_process(rank_pools, case):
    assert_equal_to_one_process(rank_pools, case)
