"""What `stagewright schedule` prints of a simulated schedule: times, bubbles in every convention, peaks and versions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.simulation.program import count_messages, flatten
from stagewright.planner.simulation.timeline import Timeline
from stagewright.planner.simulation.versions import weight_copies


def summary(schedule: Schedule, timeline: Timeline, *, bound_s: float) -> dict[str, object]:
    """Return the document of the `schedule` command; every bubble's name says its convention.

    `peak_activations` are in the unit of the costs; `weight_versions` are copies of a rank's share of the weights, over
    versions and replicas; `num_messages` counts what crosses ranks in one iteration, both ways.
    """
    return {
        "schedule": schedule.name,
        "num_ranks": schedule.num_ranks,
        "num_microbatches": schedule.num_microbatches,
        "ideal_s": timeline.ideal_s,
        "makespan_s": timeline.makespan_s,
        "longest_span_s": timeline.longest_span_s,
        "bubble_over_total": timeline.bubble_over_total,
        "bubble_over_ideal": timeline.bubble_over_ideal,
        "span_bubble_over_total": timeline.span_bubble_over_total,
        "peak_activations": plain(timeline.peak_memory()),
        "weight_versions": plain(weight_copies(schedule)),
        "num_messages": num_messages(schedule),
        "bound_s": bound_s,
    }


def num_messages(schedule: Schedule) -> int:
    """Return the messages between ranks in one iteration of a compute-only schedule."""
    return int(count_messages(flatten(schedule), False))


def plain(values: npt.NDArray[np.float64]) -> list[float | int]:
    """Return sums of shares without the dust of their rounding; whole numbers as integers."""
    rounded = [round(float(value), 9) for value in values]
    return [int(value) if value.is_integer() else value for value in rounded]
