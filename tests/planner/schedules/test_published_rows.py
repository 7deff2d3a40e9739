"""Each of the 75 published rows: our schedule of that name has no larger makespan, longest span or peak.

The rows are orders of the zero-bubble authors' and torch's generators, retimed by one simulator.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from tests.planner.schedules.timed import timed

NUM_ROWS = 75

# Name in the file: our name, chunks, cap in multiples of D.
NAMES = {
    "ZB-H1(auto, max_mem=p)": ("zb-auto", None, 1),
    "ZB-H2(auto, max_mem=2p)": ("zb-auto", None, 2),
    "ZB(auto, nolimit)": ("zb-auto", None, None),
    "ZB-V": ("zb-v", None, None),
    "V-Half": ("v-half", None, None),
    "V-Min": ("v-min", None, None),
    "1F1B-V": ("1f1b-v", None, None),
    "VPP v=2 (Megatron interleaved)": ("interleaved", 2, None),
    "1F1B": ("1f1b", None, None),
    "LoopedBFS v=2": ("breadth-first", 2, None),
    "Interleaved1F1B v=2": ("interleaved", 2, None),
    "InterleavedZeroBubble v=2": ("interleaved-zb", 2, None),
    "ZBVZeroBubble v=2": ("zb-v", 2, None),
    "DualPipeV v=2": ("dualpipe-v", 2, None),
    "Interleaved1F1B v=4": ("interleaved", 4, None),
}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "schedules.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def check(row: dict[str, str], name: str, *, chunks: int | None, memory_cap: float | None) -> None:
    forward_s, input_grad_s, weight_grad_s, latency_s = (float(part) for part in row["F/I/W/comm"].split("/"))
    result = timed(
        name,
        int(row["ranks"]),
        int(row["microbatches"]),
        (forward_s, input_grad_s, weight_grad_s),
        latency_s,
        chunks=chunks,
        memory_cap=memory_cap,
    )
    assert result.timeline.ideal_s == pytest.approx(float(row["ideal"]))
    assert result.makespan_s <= float(row["makespan"]) + 1e-6
    assert result.timeline.longest_span_s <= float(row["longest_span"]) + 1e-6
    published = [float(part) for part in row["peak_freed_at_W"].split("..")]
    assert result.peaks.max() <= max(published) + 1e-9
    if name in ("1f1b", "interleaved"):  # the same order, so the same peak on every rank
        assert result.peaks == pytest.approx(np.linspace(published[0], published[-1], len(result.peaks)))


@pytest.mark.parametrize("index", range(NUM_ROWS))
def test_our_schedule_of_that_name_is_no_worse(peer_profiles: Path, index: int) -> None:
    row = rows(peer_profiles)[index]
    name, chunks, cap = NAMES[row["schedule"]]
    check(row, name, chunks=chunks, memory_cap=None if cap is None else float(cap * int(row["ranks"])))


def test_there_are_75_rows(peer_profiles: Path) -> None:
    assert len(rows(peer_profiles)) == NUM_ROWS


def test_the_drawn_zb_h1_meets_the_automatic_rows_at_its_cap(peer_profiles: Path) -> None:
    for row in rows(peer_profiles):
        if row["schedule"] == "ZB-H1(auto, max_mem=p)":
            check(row, "zb-h1", chunks=None, memory_cap=float(row["ranks"]))
