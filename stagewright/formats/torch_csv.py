"""Schedules as the CSV files of torch.distributed.pipelining: one line for each rank, one cell for each step.

Two formats: `compute_only` holds F, B, I, W and fused pairs `(2F1;2B0)OVERLAP_F_B`, which torch lowers itself;
`compute_comms` adds SEND, RECV, UNSHARD, RESHARD and REDUCE_GRAD, which torch runs as they stand (without REDUCE_GRAD its
gradients are not divided by the number of microbatches). Cells may be empty. The grammar has no replicas, no slices, no
optimizer steps and no stage graph but a chain; optimizer steps are left out, the rest is refused.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from stagewright.planner.errors import InvalidSchedule, NotExpressible
from stagewright.planner.schedules.action import RECV_KINDS, SEND_KINDS, Action, Kind, parse_action
from stagewright.planner.schedules.registry import families
from stagewright.planner.schedules.schedule import KIND, Schedule, chain_edges, encode, step_text

CsvFormat = Literal["compute_only", "compute_comms"]

_COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})
_COMMS = SEND_KINDS | RECV_KINDS | {Kind.UNSHARD, Kind.RESHARD, Kind.REDUCE_GRAD}
_FUSED = re.compile(r"^\((.+)\)OVERLAP_F_B$")


def torch_csv(schedule: Schedule, *, csv_format: CsvFormat = "compute_only") -> str:
    """Return the CSV text; `compute_comms` takes a lowered schedule.

    Raises NotExpressible for what torch's grammar cannot say, with the first action of that kind.
    """
    _require_expressible(schedule, csv_format)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for rank in range(schedule.num_ranks):
        writer.writerow([step_text(step) for step in schedule.actions(rank) if step[0].kind is not Kind.OPT])
    return text.getvalue()


def parse_torch_csv(text: str, *, name: str = "custom") -> Schedule:
    """Return the schedule of a CSV text, of either format; its placement is where the compute actions stand.

    Raises InvalidSchedule with line and cell for text that is not an action, and for a stage on two ranks or on none.
    """
    orders = []
    stage_rank: dict[int, int] = {}
    microbatches = -1
    for rank, line in enumerate(csv.reader(io.StringIO(text))):
        steps = [_parse(cell, rank, place) for place, cell in enumerate(line) if cell.strip()]
        for step in steps:
            for action in step:
                microbatches = max(microbatches, action.microbatch)
                if stage_rank.setdefault(action.stage, rank) != rank:
                    raise InvalidSchedule(
                        f"stage {action.stage} stands on rank {stage_rank[action.stage]} and on rank {rank}",
                        field="csv",
                        hint="torch's pipelining keeps each stage on one rank",
                    )
        orders.append(encode(steps))
    if not stage_rank:
        raise InvalidSchedule("the CSV holds no action", field="csv", hint="write one line of cells for each rank")
    missing = sorted(set(range(max(stage_rank) + 1)) - set(stage_rank))
    if missing:
        raise InvalidSchedule(
            f"stage {missing[0]} stands on no rank, the greatest stage is {max(stage_rank)}", field="csv"
        )
    placement = np.array([[stage_rank[stage] for stage in range(len(stage_rank))]], dtype=np.int32)
    return Schedule(name, microbatches + 1, placement, tuple(orders))


def _parse(cell: str, rank: int, place: int) -> tuple[Action, ...]:
    fused = _FUSED.match(cell.strip())
    try:
        if fused is None:
            return (parse_action(cell),)
        return tuple(parse_action(part) for part in fused.group(1).split(";"))
    except InvalidSchedule as error:
        raise InvalidSchedule(
            f"line {rank + 1}, cell {place + 1}: {error.message}", field="csv", hint=error.hint
        ) from error


def _require_expressible(schedule: Schedule, csv_format: CsvFormat) -> None:
    reasons: Sequence[tuple[bool, str]] = (
        (schedule.num_replicas > 1, f"{schedule.num_replicas} replicas of a stage"),
        (schedule.num_slices > 1, f"{schedule.num_slices} slices of a microbatch"),
        (schedule.edges != chain_edges(schedule.num_stages), "a stage graph that is not a chain"),
        (not schedule.is_synchronous, f"weights that change under way ({schedule.weight_policy.value})"),
    )
    is_run = not any(row.not_run for row in families() if row.name == schedule.name)
    for applies, reason in reasons:
        if applies:
            raise NotExpressible(
                f"torch's pipelining CSV cannot hold {reason}, schedule {schedule.name} has it",
                field="schedule",
                hint="stagewright's own runtime runs it" if is_run else "it is planned and simulated only",
            )
    allowed = _COMPUTE | {Kind.OPT} | (_COMMS if csv_format == "compute_comms" else frozenset())
    for rank, order in enumerate(schedule.orders):
        bad = ~np.isin(order[:, KIND], sorted(int(kind) for kind in allowed))
        if bad.any():
            kind = Kind(int(order[int(np.argmax(bad)), KIND])).name
            raise NotExpressible(
                f"torch's pipelining CSV ({csv_format}) cannot hold the {kind} actions of rank {rank}", field="schedule"
            )
