"""What the first incumbents ask of one candidate, by request: a promise, a first completion, a better one.

Each answer depends on its request alone, so requests are answered a few at once on the cores there are (`lanes`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from stagewright.planner.search.cost_store import CostStore
from stagewright.planner.search.incumbent import Completion, improve, start
from stagewright.planner.search.work_count import WorkCount


class Promise(NamedTuple):
    """To start a candidate with few microbatches."""

    candidate: int


class Begin(NamedTuple):
    """To start a candidate."""

    candidate: int


class Improve(NamedTuple):
    """To move a candidate's partition, for so many steps of local search."""

    candidate: int
    bounds: tuple[int, ...]
    most_steps: int


StartRequest = Promise | Begin | Improve


class Start(NamedTuple):
    """A completion, if one was found; the seconds of its whole step; the simulations made; whether the family refuses the sizes.

    The completion of a promise is left out where microbatches are.
    """

    completion: Completion | None
    step_s: float
    simulated: int
    is_refused: bool = False


_REFUSED = Start(None, np.inf, 0, is_refused=True)


@dataclass(eq=False)
class Starts:
    """Answers requests from what candidates cost."""

    costs: CostStore

    def __post_init__(self) -> None:
        self.costs = replace(self.costs, work=WorkCount())  # the same costs; who asks counts

    def answer(self, request: StartRequest) -> Start:
        """Return what became of a candidate."""
        if isinstance(request, Promise):
            return self._promised(request.candidate)
        costs = self.costs.of(request.candidate)
        if costs is None:
            return _REFUSED
        if isinstance(request, Begin):
            return _started(start(costs), 1)
        return _started(*improve(costs, request.bounds, most_steps=request.most_steps))

    def _promised(self, index: int) -> Start:
        """Return a start with few microbatches, the rest at the pace of its fullest rank."""
        short = self.costs.short_of(index)
        if short is None:
            return _REFUSED
        costs, left = short
        completion = start(costs)
        if completion is None or left == 0:
            return _started(completion, 1)
        on_stage = costs.stage_costs(completion.counts).sum(axis=0)
        on_rank = np.where(costs.slots.stage >= 0, on_stage[costs.slots.stage], 0.0).sum(axis=1)
        return Start(None, completion.step_s + left / costs.order.num_replicas * float(on_rank.max()), 1)


def _started(completion: Completion | None, simulated: int) -> Start:
    return Start(completion, np.inf if completion is None else completion.step_s, simulated)
