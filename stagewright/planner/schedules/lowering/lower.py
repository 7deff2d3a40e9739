"""From a compute-only schedule to the lists that a runtime executes and the NCCL checker accepts.

The passes, each a pure function, in this order: merge adjacent I and W; simulate, with what messages of one group wait for;
insert sends, receives and gradient reductions at the simulated instants; optimizer steps; parameter gathers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.action import COMPUTE_KINDS, Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.lowering.gradients import reduction_rows, with_optimizer_steps
from stagewright.planner.schedules.lowering.insertion import NewRows, insert_rows
from stagewright.planner.schedules.lowering.merge import Merge, merge_backwards
from stagewright.planner.schedules.lowering.messages import (
    joint_edges,
    message_rows,
    shares_rows,
    stages_without_instant,
)
from stagewright.planner.schedules.lowering.parameters import Gather, with_parameter_gathers
from stagewright.planner.schedules.schedule import KIND, Schedule
from stagewright.planner.simulation.nccl import check_nccl
from stagewright.planner.simulation.network import Links, Shares
from stagewright.planner.simulation.program import flatten
from stagewright.planner.simulation.simulate import action_times

Floats = npt.NDArray[np.float64]


def lower(
    schedule: Schedule,
    costs: StageCosts,
    *,
    data_parallel: bool = False,
    zero: int = 0,
    optimizer: bool = True,
    merge: Merge = "free",
    gather: Gather = "run",
    links: Links | None = None,
    shares: Shares | None = None,
) -> Schedule:
    """Return the schedule with communication, reductions, optimizer steps and gathers; placement and edges unchanged.

    Parameters
    ----------
    data_parallel : each stage's gradients are reduced over a data-parallel group; replicas of a stage always are.
    zero : ZeRO stage; 3 adds UNSHARD and RESHARD.
    optimizer : end with OPT rows.
    merge : which adjacent I and W become B, see `merge`.
    gather : how often ZeRO-3 gathers, see `parameters`.
    links, shares : what the instants are simulated with; sends always overlap there.

    Raises InvalidSchedule for a deadlock, also of messages that have to leave together or in no order (see `messages`), and InvalidArgument
    for a schedule that is lowered already.
    """
    _check(schedule, zero)
    links = replace(links or Links(), overlap=True)
    schedule = merge_backwards(schedule, costs, which=merge, links=links, shares=shares)
    edges, apart = joint_edges(schedule), stages_without_instant(schedule)
    joint = schedule if edges == schedule.edges else replace(schedule, edges=edges)
    _, end_s = action_times(joint, costs, links=_without_bytes_behind(links, schedule, joint), shares=shares)
    program = flatten(schedule)
    past_s = np.where(np.isin(program.rows[:, KIND], [int(kind) for kind in COMPUTE_KINDS]), end_s, 0.0)
    new = [message_rows(schedule, end_s, apart)]
    if data_parallel or schedule.num_replicas > 1:
        new.append(reduction_rows(schedule, program, end_s))
    must_check = shares_rows(schedule) and not apart
    schedule = replace(schedule, orders=insert_rows(schedule, past_s, NewRows.join(new)))
    if must_check:  # rows that serve several messages may leave no order for all pairs of ranks
        check_nccl(schedule, per_direction=False)
    if optimizer:
        schedule = replace(schedule, orders=with_optimizer_steps(schedule))
    if zero >= 3:
        schedule = replace(schedule, orders=with_parameter_gathers(schedule, gather=gather))
    return schedule


def _without_bytes_behind(links: Links, schedule: Schedule, joint: Schedule) -> Links:
    """Return the links with nothing on the edges that `joint` has behind those of the schedule."""

    def with_zeros(size: float | Floats | None) -> float | Floats | None:
        values = np.asarray(0.0 if size is None else size, dtype=np.float64)
        if size is None or not values.any():
            return size
        widened = np.zeros(len(joint.edges))
        widened[: len(schedule.edges)] = values
        return widened

    if joint is schedule:
        return links
    boundary = with_zeros(links.boundary_bytes)
    assert boundary is not None
    return replace(links, boundary_bytes=boundary, gradient_bytes=with_zeros(links.gradient_bytes))


def _check(schedule: Schedule, zero: int) -> None:
    if zero not in (0, 1, 2, 3):
        raise InvalidArgument(f"ZeRO stage {zero} does not exist", field="zero", hint="take 0, 1, 2 or 3")
    lowered = (Kind.SEND_F, Kind.SEND_B, Kind.RECV_F, Kind.RECV_B, Kind.REDUCE_GRAD, Kind.UNSHARD, Kind.OPT)
    for rank, order in enumerate(schedule.orders):
        found = np.isin(order[:, KIND], [int(kind) for kind in lowered])
        if found.any():
            kind = Kind(int(order[int(np.argmax(found)), KIND])).name
            raise InvalidArgument(
                f"schedule {schedule.name} is lowered already: rank {rank} holds {kind} rows",
                field="schedule",
                hint="lower the generator's compute-only schedule",
            )
