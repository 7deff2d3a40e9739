"""The picture in each generator's docstring is the schedule that it generates."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import families, generate
from stagewright.planner.schedules.schedule import decode
from stagewright.planner.simulation.timeline import COMPUTE_LANE
from tests.planner.schedules.timed import Timed, timed

EQUAL_BACKWARD, SPLIT = (1.0, 0.5, 0.5), (1.0, 1.0, 1.0)

LISTED = {
    "1f1b-vocab": (2, 3, {}),
    "v-half-vocab": (2, 2, {}),
    "pipefb": (2, 3, {}),
    "pipeoffload": (4, 5, {"memory_cap": 3.0}),
    "flexpipe": (2, 3, {}),
}

DRAWN = {
    "naive": (3, 2, EQUAL_BACKWARD, {}),
    "gpipe": (3, 4, EQUAL_BACKWARD, {}),
    "1f1b": (3, 5, EQUAL_BACKWARD, {}),
    "dapple-pb": (3, 7, EQUAL_BACKWARD, {"latency_s": 1.0}),
    "interleaved": (2, 2, EQUAL_BACKWARD, {}),
    "breadth-first": (2, 2, EQUAL_BACKWARD, {}),
    "terapipe": (2, 1, EQUAL_BACKWARD, {"slices": 3}),
    "seq1f1b": (2, 2, EQUAL_BACKWARD, {"slices": 2}),
    "gems": (3, 3, EQUAL_BACKWARD, {}),
    "chimera": (4, 4, EQUAL_BACKWARD, {}),
    "wave": (3, 3, EQUAL_BACKWARD, {}),
    "zb-h1": (3, 4, SPLIT, {}),
    "zb-h2": (3, 5, SPLIT, {}),
    "zb-auto": (2, 3, (1.0, 2.0, 1.0), {"memory_cap": 2.0}),
    "interleaved-zb": (2, 2, SPLIT, {}),
    "zb-v": (2, 4, SPLIT, {}),
    "v-half": (3, 3, SPLIT, {}),
    "v-min": (3, 3, SPLIT, {}),
    "1f1b-v": (2, 3, EQUAL_BACKWARD, {}),
    "dualpipe": (2, 4, SPLIT, {}),
    "dualpipe-v": (2, 4, SPLIT, {}),
}


def drawing(result: Timed) -> str:
    """Return one line a rank on a common time axis, a cell for each slot of the shortest action."""
    schedule, timeline = result.schedule, result.timeline
    one_stage = schedule.num_replicas == 1 and schedule.num_stages == schedule.num_ranks
    compute = timeline.lane == COMPUTE_LANE
    labels = [
        str(decode(row)) if lane == COMPUTE_LANE else ""
        for lane, row in zip(timeline.lane, timeline.action.tolist(), strict=True)
    ]
    if one_stage:
        labels = [label.lstrip("0123456789") for label in labels]
    slot_s = float((timeline.end_s - timeline.start_s)[compute].min())
    width = max(len(label) for label in labels) + 1
    lines = []
    for rank in range(schedule.num_ranks):
        line = ""
        for index in np.flatnonzero(compute & (timeline.rank == rank)):
            line = line.ljust(round(float(timeline.start_s[index]) / slot_s) * width) + labels[index] + " "
        lines.append(f"rank {rank}  {line}".rstrip())
    return "\n".join("    " + line for line in lines)


@pytest.mark.parametrize("name", DRAWN)
def test_the_docstring_draws_the_generated_schedule(name: str) -> None:
    num_ranks, num_microbatches, seconds, options = DRAWN[name]
    picture = drawing(timed(name, num_ranks, num_microbatches, seconds, **options))
    module = next(row.generate.__module__ for row in families() if row.name == name)
    assert picture in (importlib.import_module(module).__doc__ or ""), f"draw this in {module}:\n{picture}"


@pytest.mark.parametrize("name", LISTED)
def test_the_docstring_lists_the_generated_orders(name: str) -> None:
    num_ranks, num_microbatches, options = LISTED[name]
    schedule = generate(name, ScheduleRequest(num_ranks, num_microbatches, **options))
    text = (
        importlib.import_module(next(row.generate.__module__ for row in families() if row.name == name)).__doc__ or ""
    )
    for rank in range(num_ranks if name != "pipeoffload" else 1):
        line = f"rank {rank}  " + " ".join(schedule.text(rank))
        assert line in text, f"list this: {line}"
