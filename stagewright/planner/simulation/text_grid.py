"""Schedules as text: the steps of all ranks around one place, and a whole timeline on a time axis.

rank 0 | 0F0  0F1 [0B0] 0F2
rank 1 | 1F0  1B0  1F1  1B1
"""

from __future__ import annotations

from stagewright.planner.schedules.schedule import Schedule, decode


def draw_order(schedule: Schedule, rank: int, index: int, *, before: int = 4, after: int = 4) -> str:
    """Return the rows around `index` of the rank's order, in brackets, and the same places of at most four ranks each side."""
    ranks = range(max(0, rank - 4), min(schedule.num_ranks, rank + 5))
    first = max(0, index - before)
    cells: list[list[str]] = []
    for other in ranks:
        rows = schedule.orders[other][first : index + after + 1].tolist()
        cells.append([f" {decode(row)} " for row in rows])
        if other == rank and index - first < len(cells[-1]):
            cells[-1][index - first] = f"[{cells[-1][index - first].strip()}]"
    columns = max((len(line) for line in cells), default=0)
    widths = [max(len(line[column]) for line in cells if column < len(line)) for column in range(columns)]
    lead = "... " if first else ""
    label = max(len(str(other)) for other in ranks)
    return "\n".join(
        f"rank {other:>{label}} | {lead}"
        + "".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip()
        for other, line in zip(ranks, cells, strict=True)
    )
