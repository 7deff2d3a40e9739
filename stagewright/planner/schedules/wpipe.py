"""WPipe: the model in two groups of stages, updated alternately; the next period's forward precedes this one's backward.

Rank d holds stage d (group 1) and stage D + d (group 2). With f, b on group 1 and F, B on group 2 the passes of period
k on a rank obey

    F(k + 1) after all B(k)           group 2 always uses its newest weights
    f(k + 2) after all b(k)           group 1 is at most one period ahead of its update, and keeps two versions

and every rank runs what can start first, backwards before forwards. Weights take 1.5 M where 2BW takes 2 M, and half of
2BW's gradients are stale. The order is made by list scheduling with the request's costs, O(N D) for N passes.

Paper: Yang et al., Group-based Interleaved Pipeline Parallelism for Large-scale DNN Training, ICLR 2022.
"""

from __future__ import annotations

from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.pipedream_2bw import RULE, num_updates
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy, encode, loop_placement
from stagewright.planner.schedules.sizes import check_placement, costs_of, require, sizes_of


def wpipe(request: ScheduleRequest) -> Schedule:
    """Return `updates` periods (1 unless told) of T microbatches each."""
    sizes = sizes_of(request, "wpipe", default_chunks=2, least_chunks=2, most_chunks=2)
    ranks, period = sizes.num_ranks, sizes.num_microbatches
    require(
        period >= ranks,
        f"wpipe updates each group after at least D = {ranks} microbatches, {period} were asked for",
        field="num_microbatches",
    )
    placement = loop_placement(ranks, 2)
    check_placement(request, placement, "wpipe")
    updates = num_updates(request)
    queues = _Queues(ranks, period, updates, costs_of(request, sizes), request.latency_s)
    orders = tuple(encode(actions) for actions in _serve(queues))
    parameters = {"updates": updates, "update_every": period}
    return Schedule(
        "wpipe", period * updates, placement, orders, weight_policy=WeightPolicy.TWO_GROUP, parameters=parameters
    )


class _Queues:
    """The next microbatch of each pass on each rank, and when everything done so far ended."""

    def __init__(self, num_ranks: int, period: int, updates: int, costs: StageCosts, latency_s: float) -> None:
        self.num_ranks, self.period, self.total = num_ranks, period, period * updates
        backward_s = costs.input_grad_s + costs.weight_grad_s
        self.seconds = {Kind.F: costs.forward_s, Kind.B: backward_s}
        self.latency_s = latency_s
        self.end_s: dict[tuple[Kind, int, int], float] = {}
        self.next = dict.fromkeys(((kind, stage) for kind in (Kind.F, Kind.B) for stage in range(2 * num_ranks)), 0)

    def ready_s(self, kind: Kind, stage: int, microbatch: int) -> float | None:
        """Return when the pass can start, None while something before it is not done."""
        last = 2 * self.num_ranks - 1
        if kind is Kind.F:
            needed = [] if stage == 0 else [(Kind.F, stage - 1, microbatch)]
            behind = 1 if stage >= self.num_ranks else 2  # group 1 may be one period ahead of its update
            done = (microbatch // self.period - behind + 1) * self.period - 1
            needed += [(Kind.B, stage, done)] if done >= 0 else []
        else:
            needed = [(Kind.F, stage, microbatch) if stage == last else (Kind.B, stage + 1, microbatch)]
        times = [0.0]
        for before in needed:
            if before not in self.end_s:
                return None
            crosses = before[1] % self.num_ranks != stage % self.num_ranks
            times.append(self.end_s[before] + (self.latency_s if crosses else 0.0))
        return max(times)

    def choice(self, rank: int, clock_s: float) -> tuple[float, int, Kind, int] | None:
        """Return the rank's next pass as (start, preference, kind, stage): the earliest, backwards first."""
        best: tuple[float, int, Kind, int] | None = None
        passes = ((Kind.B, rank + self.num_ranks), (Kind.B, rank), (Kind.F, rank + self.num_ranks), (Kind.F, rank))
        for preference, (kind, stage) in enumerate(passes):
            microbatch = self.next[kind, stage]
            ready = self.ready_s(kind, stage, microbatch) if microbatch < self.total else None
            if ready is not None and (best is None or (max(ready, clock_s), preference) < best[:2]):
                best = (max(ready, clock_s), preference, kind, stage)
        return best


def _serve(queues: _Queues) -> list[list[Action]]:
    """Return each rank's passes in the order in which they can start."""
    ranks = range(queues.num_ranks)
    clock = [0.0 for _ in ranks]
    actions: list[list[Action]] = [[] for _ in ranks]
    while True:
        choices = [(choice, rank) for rank in ranks if (choice := queues.choice(rank, clock[rank])) is not None]
        if not choices:
            return actions
        (start, _, kind, stage), rank = min(choices)
        microbatch = queues.next[kind, stage]
        queues.next[kind, stage] += 1
        clock[rank] = start + float(queues.seconds[kind][stage])
        queues.end_s[kind, stage, microbatch] = clock[rank]
        actions[rank].append(Action(kind, stage, microbatch))


FAMILY = ScheduleFamily(
    "wpipe",
    "Yang et al., Group-based Interleaved Pipeline Parallelism for Large-scale DNN Training, ICLR 2022",
    wpipe,
    aliases=("2gw",),
    synchronous=False,
    default_chunks=2,
    weight_policy=WeightPolicy.TWO_GROUP,
    constraint=RULE,
)
