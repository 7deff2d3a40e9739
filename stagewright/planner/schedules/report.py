"""One schedule from request to numbers: generate or search, simulate, bound. What the command line and service call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.schedules.auto import (
    AutoRequest,
    AutoResult,
    Effort,
    PlacementChoice,
    any_order_bound,
    search,
)
from stagewright.planner.schedules.auto.request import DEFAULT_CHUNKS, MOST_COPIES
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import Schedule, chain_edges, loop_placement, wave_placement
from stagewright.planner.simulation.bound import work_bound
from stagewright.planner.simulation.implied_shares import implied_shares
from stagewright.planner.simulation.network import Links
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.summary import summary
from stagewright.planner.simulation.timeline import Timeline

AUTO = "auto"
MOST_BOUNDED_ACTIONS = 200_000  # beyond, only the cheap bound is computed


@dataclass(frozen=True, eq=False)
class ScheduleReport:
    """A simulated schedule with its proved bound.

    Parameters
    ----------
    schedule, costs : the orders and the virtual stages they run.
    timeline : one simulated iteration, activations in rank-microbatches.
    bound_s : no order of this work on these ranks (for `auto`: on any placement tried) ends sooner.
    num_microbatches : as asked for; the schedule may run more units (halves, several updates).
    auto : what the search found, None for a named schedule.
    """

    schedule: Schedule
    costs: StageCosts
    timeline: Timeline
    bound_s: float
    num_microbatches: int
    auto: AutoResult | None = None

    def document(self) -> dict[str, object]:
        """Return the document of the `schedule` command."""
        found = summary(self.schedule, self.timeline, bound_s=self.bound_s)
        found["num_microbatches"] = self.num_microbatches
        if self.auto is None:
            return found
        gain = self.auto.gain
        return found | {
            "placement": self.auto.placement,
            "num_chunks": self.auto.num_chunks,
            "num_copies": self.auto.num_copies,
            "one_copy": {"makespan_s": self.auto.one_copy.makespan_s, "bound_s": self.auto.one_copy.bound_s},
            "evaluations": self.auto.evaluations,
            "stop": self.auto.stop.value,
            "gap": self.auto.gap,
            "best_named": None if gain is None else {"schedule": gain.name, "makespan_s": gain.named_s},
        }


def report(
    name: str,
    request: ScheduleRequest,
    *,
    effort: Effort = Effort.NORMAL,
    placement: PlacementChoice = PlacementChoice.ANY,
    copies: int = MOST_COPIES,
    seed: int = 0,
    deadline_s: float | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> ScheduleReport:
    """Return the named schedule, or the best one found for `auto`, simulated at the request's costs and latency.

    `request.costs` hold activations in rank-microbatches; equal unit costs when None. `copies` is the most copies of its weights that
    a rank may hold. `effort`, `seed`, `deadline_s` and `progress` concern `auto` only. Raises InvalidArgument for sizes the schedule does not admit and for a cap below
    what it needs, Infeasible when no schedule fits the cap of `auto`.
    """
    if name.strip().lower() == AUTO:
        result = _search(request, effort, placement, copies, seed, deadline_s, progress)
        schedule, costs, bound_s = result.schedule, result.costs, result.bound_s
    else:
        result = None
        schedule = generate(name, _with_placement(request, placement))
        _check_copies(schedule, copies)
        costs = request.costs or _equal_costs(schedule)
        bound_s = _bound(schedule, costs, request)
    timeline = simulate(schedule, costs, links=Links(latency_s=request.latency_s), shares=implied_shares(schedule))
    assert bound_s <= timeline.makespan_s * (1 + 1e-9), f"bound {bound_s} above the makespan {timeline.makespan_s}"
    bound_s = min(bound_s, timeline.makespan_s)  # the two are sums in different orders
    return ScheduleReport(schedule, costs, timeline, bound_s, request.num_microbatches, result)


def infeasible_document(name: str, request: ScheduleRequest, error: Infeasible) -> dict[str, object]:
    """Return the document of a search that no schedule satisfies: the command's own keys, empty, and the error."""
    keys = (
        "ideal_s makespan_s longest_span_s bubble_over_total bubble_over_ideal span_bubble_over_total "
        "peak_activations weight_versions num_messages bound_s"
    )
    sizes = {"schedule": name, "num_ranks": request.num_ranks, "num_microbatches": request.num_microbatches}
    return {**sizes, **dict.fromkeys(keys.split()), "status": "infeasible", "error": error.to_json()}


def _equal_costs(schedule: Schedule) -> StageCosts:
    chunks = schedule.num_stages / schedule.num_ranks
    share = np.full(schedule.num_stages, 1.0 / chunks)
    return StageCosts.of(share, share, share, activation=share)


def _check_copies(schedule: Schedule, copies: int) -> None:
    if schedule.num_replicas > copies:
        raise InvalidArgument(
            f"{schedule.name} keeps {schedule.num_replicas} copies of the weights on each rank, {copies} was asked for",
            field="copies",
            hint="take auto or a schedule of one replica, see `stagewright schedule list`",
        )


def _search(
    request: ScheduleRequest,
    effort: Effort,
    placement: PlacementChoice,
    copies: int,
    seed: int,
    deadline_s: float | None,
    progress: Callable[[float, float], None] | None,
) -> AutoResult:
    for field, value, neutral in (("slices", request.num_slices, 1), ("waves", request.num_waves, None)):
        if value != neutral:
            raise InvalidArgument(
                f"auto keeps microbatches whole and chooses its own waves, {field} {value} was asked for",
                field=field,
                hint=f"leave --{field} out",
            )
    costs = request.costs or StageCosts.uniform(request.num_ranks)
    return search(
        AutoRequest(
            request.num_ranks,
            request.num_microbatches,
            costs,
            latency_s=request.latency_s,
            memory_cap=request.memory_cap,
            placement=placement if request.placement is None else request.placement[0],
            chunk_counts=DEFAULT_CHUNKS if request.num_chunks is None else (request.num_chunks,),
            copies=copies,
            effort=effort,
            seed=seed,
        ),
        progress=progress,
        deadline_s=deadline_s,
    )


def _with_placement(request: ScheduleRequest, choice: PlacementChoice) -> ScheduleRequest:
    """Return the request with the placement of that name, which the family then accepts or refuses."""
    if choice is PlacementChoice.ANY or request.placement is not None:
        return request
    if choice is PlacementChoice.OPERATORS:
        raise InvalidArgument(
            "placement operators looks at every map of entries to ranks, a named schedule has its own",
            field="placement",
            hint="take auto",
        )
    chunks = request.num_chunks or (1 if choice is PlacementChoice.LOOP else 2)
    if request.num_waves is not None:
        chunks = 2 * request.num_waves
    if choice is PlacementChoice.V and chunks != 2:
        raise InvalidArgument(f"a V has 2 chunks, {chunks} were asked for", field="placement", hint="take wave")
    make = loop_placement if choice is PlacementChoice.LOOP else wave_placement
    return replace(request, placement=make(request.num_ranks, chunks))


def _bound(schedule: Schedule, costs: StageCosts, request: ScheduleRequest) -> float:
    factors = implied_shares(schedule).microbatch_time
    bound_s = work_bound(schedule, costs, latency_s=request.latency_s, microbatch_time=factors)
    chain = schedule.edges == chain_edges(schedule.num_stages)
    special = schedule.num_replicas > 1 or schedule.num_slices > 1 or not chain or factors is not None
    if special or schedule.num_actions > MOST_BOUNDED_ACTIONS:
        return bound_s
    any_order_s = any_order_bound(
        costs,
        schedule.placement[0],
        num_ranks=schedule.num_ranks,
        num_microbatches=schedule.num_microbatches,
        latency_s=request.latency_s,
        memory_cap=request.memory_cap,
    )
    return max(bound_s, any_order_s)
