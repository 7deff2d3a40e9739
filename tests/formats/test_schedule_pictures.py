"""Timelines as Chrome traces and as SVG pictures."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from stagewright.formats.chrome_trace import chrome_trace
from stagewright.formats.schedule_svg import FILLS, schedule_svg
from stagewright.planner.errors import NotExpressible
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.simulation.network import Links
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.text_grid import draw_timeline
from tests.planner.simulation.random_schedules import one_f_one_b

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def timeline():
    return simulate(one_f_one_b(4, 8), StageCosts.uniform(4), links=Links(latency_s=0.25))


def test_a_trace_holds_every_span_in_microseconds(timeline):
    trace = json.loads(json.dumps(chrome_trace(timeline, name="1f1b"), allow_nan=False))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == len(timeline.start_s)
    first = next(event for event in spans if event["name"] == "0F1")
    assert (first["pid"], first["ts"], first["dur"]) == (0, 1e6, 1e6)
    assert sum(event["dur"] for event in spans if event["tid"] == 0) == pytest.approx(timeline.busy_s().sum() * 1e6)


def test_a_trace_counts_live_memory_of_each_rank(timeline):
    counters = [event for event in chrome_trace(timeline)["traceEvents"] if event["ph"] == "C"]
    peaks = [max(event["args"]["live"] for event in counters if event["pid"] == rank) for rank in range(4)]
    assert peaks == [4, 3, 2, 1]


def test_a_trace_marks_the_critical_path(timeline):
    spans = [event for event in chrome_trace(timeline)["traceEvents"] if event["ph"] == "X"]
    marked = sum(event["dur"] for event in spans if event["args"]["critical"])
    assert marked == pytest.approx(timeline.makespan_s * 1e6)


def test_a_picture_draws_each_action_where_it_ran(timeline):
    root = ElementTree.fromstring(schedule_svg(timeline, title="1f1b <4 x 8>"))
    groups = {group.find(f"{SVG}title").text: group.find(f"{SVG}rect") for group in root.iter(f"{SVG}g")}
    assert len(groups) == 64
    scale = (1280 - 64 - 16) / timeline.makespan_s
    rect = groups["3F0 on rank 3, 3.75 to 4.75 s"]
    assert float(rect.get("x")) == pytest.approx(64 + 3.75 * scale, abs=0.01)
    assert float(rect.get("width")) == pytest.approx(scale, abs=0.01)
    assert rect.get("fill") == FILLS[Kind.F]


def test_a_picture_numbers_microbatches_shows_idle_time_and_memory(timeline):
    text = schedule_svg(timeline, title="1f1b")
    root = ElementTree.fromstring(text)
    labels = [label.text for label in root.iter(f"{SVG}text")]
    assert all(str(microbatch) in labels for microbatch in range(8))
    assert any(label.startswith("idle ") for label in labels if label)
    lines = list(root.iter(f"{SVG}polyline"))
    assert [line.find(f"{SVG}title").text for line in lines] == [f"rank {rank}: peak {4 - rank}" for rank in range(4)]


def test_the_same_timeline_gives_the_same_picture(timeline):
    assert schedule_svg(timeline, title="a") == schedule_svg(timeline, title="a")


def test_too_many_actions_for_a_picture_are_refused_with_both_numbers(timeline):
    count = 50_001
    zeros = np.zeros(count, dtype=np.int32)
    huge = replace(
        timeline,
        rank=zeros,
        lane=zeros,
        action=np.zeros((count, 6), np.int32),
        start_s=np.zeros(count),
        end_s=np.ones(count),
    )
    with pytest.raises(NotExpressible, match="50001 actions are too many for a picture, it holds 50000"):
        schedule_svg(huge, title="huge")


def test_a_timeline_as_text_has_one_axis_for_all_ranks():
    lines = draw_timeline(simulate(one_f_one_b(2, 2), StageCosts.uniform(2)))
    drawn = ["".join(text for text, _ in pieces) for pieces in lines]
    assert drawn == ["F0 F1    B0       B1    ", "   F0 B0    F1 B1    "] or drawn[0].startswith("F0 F1")
    assert drawn[0].index("B0") == drawn[1].index("F1")
    assert [kind for _, kind in lines[0]] == [Kind.F, Kind.F, None, Kind.B, None, Kind.B]


def test_a_timeline_wider_than_the_screen_is_not_drawn():
    assert draw_timeline(simulate(one_f_one_b(2, 64), StageCosts.uniform(2)), most_columns=40) is None
