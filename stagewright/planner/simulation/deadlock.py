"""Why a set of stopped ranks cannot go on: the cycle of waits between them, as an error that draws it.

Each stopped rank waits, at its first action that did not run, for an action that another rank has not run. Following
"waits for an action of" from rank to rank either reaches an action that nobody holds, or comes back: a cycle.
O(D + N) for the one search over the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagewright.planner.errors import InvalidSchedule
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.schedule import FUSED, Schedule, decode
from stagewright.planner.simulation.text_grid import draw_order

_BACKWARD = (Kind.B, Kind.I)


def explain_deadlock(schedule: Schedule, stopped_at: Sequence[int]) -> InvalidSchedule:
    """Return the error for ranks whose rows before `stopped_at[rank]` ran and none after can.

    It names the waiting action of each rank on the cycle, or the action that is missing.
    """
    where = _positions(schedule)
    done = {action for action, (rank, index) in where.items() if index < stopped_at[rank]}
    stuck = [rank for rank in range(schedule.num_ranks) if stopped_at[rank] < len(schedule.orders[rank])]
    rank = stuck[0]
    seen: dict[int, int] = {}
    chain: list[tuple[int, Action, Action, int, int]] = []
    while rank not in seen:
        seen[rank] = len(chain)
        waiting, needed = _waits_for(schedule, rank, int(stopped_at[rank]), done)
        found = [option for option in needed if option in where]
        grid = draw_order(schedule, rank, int(stopped_at[rank]))
        if not found:
            return InvalidSchedule(
                f"rank {rank}, step {stopped_at[rank]}: {waiting} waits for {needed[0]}, which no rank runs\n{grid}",
                hint=f"add {needed[0]} to rank {schedule.placement[needed[0].replica, needed[0].stage]}",
            )
        holder, index = where[found[0]]
        chain.append((rank, waiting, found[0], holder, index))
        if holder == rank:
            return InvalidSchedule(
                f"rank {rank}, step {stopped_at[rank]}: {waiting} stands before {found[0]} (step {index}), "
                f"which it needs\n{grid}",
                hint=f"move {found[0]} in front of {waiting}",
            )
        rank = holder
    cycle = chain[seen[rank] :]
    waits = "; ".join(
        f"rank {rank} at {waiting} waits for {needed} of rank {holder} (its step {index})"
        for rank, waiting, needed, holder, index in cycle
    )
    first = cycle[0]
    return InvalidSchedule(
        f"the orders deadlock: {waits}\n{draw_order(schedule, first[0], int(stopped_at[first[0]]))}",
        hint="every rank on the cycle stands before the action that the next one needs; reorder one of them",
    )


def _positions(schedule: Schedule) -> dict[Action, tuple[int, int]]:
    where: dict[Action, tuple[int, int]] = {}
    for rank, order in enumerate(schedule.orders):
        for index, row in enumerate(order.tolist()):
            where.setdefault(decode(row), (rank, index))
    return where


def _waits_for(schedule: Schedule, rank: int, index: int, done: set[Action]) -> tuple[Action, list[Action]]:
    """Return the action that the rank stands at and the actions any one of which would serve it next."""
    rows = schedule.orders[rank].tolist()
    while True:
        action = decode(rows[index])
        for options in _needs(schedule, action):
            if not any(option in done for option in options) and not _covered(schedule, options[0], done):
                return action, options
        if not rows[index][FUSED]:
            raise AssertionError(f"rank {rank} stopped at {action}, which can run")
        index += 1


def _needs(schedule: Schedule, action: Action) -> list[list[Action]]:
    """Return, for each dependency of a compute action, the actions that would satisfy it, whole or by slice."""
    needs: list[list[Action]] = []
    slices = range(schedule.num_slices) if action.slice < 0 and schedule.num_slices > 1 else (action.slice,)
    for part in slices:
        if action.kind is Kind.F:
            sources = [source for source, target in schedule.edges if target == action.stage]
            needs += [_options(action, (Kind.F,), source, part) for source in sources]
        elif action.kind is Kind.W:
            needs.append(_options(action, (Kind.I,), action.stage, part))
        elif action.kind in _BACKWARD:
            needs.append(_options(action, (Kind.F,), action.stage, part))
            targets = [target for source, target in schedule.edges if source == action.stage]
            needs += [_options(action, _BACKWARD, target, part) for target in targets]
    return needs


def _options(action: Action, kinds: Sequence[Kind], stage: int, part: int) -> list[Action]:
    parts = {part, -1, 0} if part <= 0 else {part, -1}
    return [
        Action(kind, stage, action.microbatch, option, action.replica)
        for option in sorted(parts, key=lambda value: (value != part, value))
        for kind in kinds
    ]


def _covered(schedule: Schedule, action: Action, done: set[Action]) -> bool:
    """Return whether every slice of a whole action is done."""
    if action.slice >= 0 or schedule.num_slices == 1:
        return False
    kinds = (Kind.F,) if action.kind is Kind.F else _BACKWARD
    return all(
        any(Action(kind, action.stage, action.microbatch, part, action.replica) in done for kind in kinds)
        for part in range(schedule.num_slices)
    )
