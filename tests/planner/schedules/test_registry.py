"""The registry: names, aliases, properties, and refusals that hold both numbers."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import families, family, generate
from stagewright.planner.schedules.schedule import KIND

SYNCHRONOUS = (
    "naive", "gpipe", "1f1b", "dapple-pb", "interleaved", "breadth-first", "gems", "chimera", "zb-h1", "zb-h2",
    "zb-auto", "zb-v", "v-min", "v-half", "interleaved-zb", "wave", "dualpipe", "dualpipe-v", "terapipe", "seq1f1b",
    "1f1b-v",
)  # fmt: skip


def test_every_synchronous_schedule_is_there() -> None:
    assert set(SYNCHRONOUS) <= {row.name for row in families()}


def test_names_and_aliases_are_unique() -> None:
    known = [name for row in families() for name in (row.name, *row.aliases)]
    assert len(known) == len(set(known))


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("dapple", "1f1b"),
        ("pipedream-flush", "1f1b"),
        ("hanayo", "wave"),
        ("v-zb", "zb-v"),
        ("looped-bfs", "breadth-first"),
        ("ZB_V", "zb-v"),
    ],
)
def test_aliases_find_their_family(alias: str, name: str) -> None:
    assert family(alias).name == name


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InvalidArgument, match="there is no schedule 'chimaera'") as refusal:
        family("chimaera")
    assert refusal.value.hint is not None
    assert refusal.value.hint.startswith("did you mean chimera?")


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_properties_tell_the_truth(name: str) -> None:
    row = family(name)
    schedule = generate(name, ScheduleRequest(4, 8))
    assert row.paper
    assert row.synchronous
    assert schedule.is_synchronous
    assert schedule.name == name
    assert schedule.num_replicas == row.num_replicas
    assert schedule.num_stages == 4 * row.default_chunks
    has_split = any((order[:, KIND] == Kind.W).any() for order in schedule.orders)
    assert has_split == row.split_backward


@pytest.mark.parametrize("name", SYNCHRONOUS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ranks": 0}, "num_ranks is 0"),
        ({"num_microbatches": 0}, "num_microbatches is 0"),
        ({"num_microbatches": -3}, "num_microbatches is -3"),
        ({"num_chunks": 0}, "0"),
        ({"num_slices": 0}, "0"),
        ({"latency_s": -1.0}, "latency_s is -1.0"),
        ({"latency_s": float("nan")}, "latency_s is nan"),
        ({"memory_cap": 0.0}, "memory_cap is 0.0"),
        ({"costs": StageCosts.uniform(5)}, "costs hold 5 stages"),
        ({"placement": np.array([[0, 0, 0, 0]], dtype=np.int32)}, "places its stages"),
        ({"edges": ((0, 1), (0, 2), (1, 3), (2, 3))}, "runs a chain of stages"),
    ],
)
def test_bad_requests_name_field_and_value(name: str, change: dict[str, object], message: str) -> None:
    request = {"num_ranks": 4, "num_microbatches": 8, **change}
    with pytest.raises(InvalidArgument, match=message) as refusal:
        generate(name, ScheduleRequest(**request))  # type: ignore[arg-type]
    assert refusal.value.field is not None


def test_one_chunk_families_refuse_chunks() -> None:
    with pytest.raises(InvalidArgument, match="gpipe puts 1 stage on a rank, 2 were asked for"):
        generate("gpipe", ScheduleRequest(4, 8, num_chunks=2))
    with pytest.raises(InvalidArgument, match="zb-v puts 2 stages on a rank, 3 were asked for"):
        generate("zb-v", ScheduleRequest(4, 8, num_chunks=3))


def test_a_negative_effort_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="effort is -1"):
        generate("zb-v", ScheduleRequest(4, 8, parameters={"effort": -1}))
