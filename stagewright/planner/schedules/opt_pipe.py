"""OptPipe: the order of F and B and the offloads together, by an integer programme, for the least makespan under a cap.

One stage on each rank, times and latency given; microbatches keep their order in F and in B. On each rank the binaries are
o(k, j) = "F k before B j" for k > j (else it always is), x(i) = "activation i is moved", and y(i, p) = "i is away during action p".
Moves run beside the action after F i and the action before B i, as in `pipe_offload`, so i is away during p only if both F i and p,
and p and B i, have an action between them. Minimise M + 1e-6 * sum of x, in units of the mean action, subject to

    E(d, F, j) >= E(d - 1, F, j) + c + t,   E(d, B, j) >= E(d + 1, B, j) + c + t,   E(d, B, j) >= E(d, F, j) + t
    E(F k) + t <= E(B j) + H (1 - o(k, j)),   E(B j) + t <= E(F k) + H o(k, j)
    F i at or before p, B i at or after p, less the y(i, p): at most the cap, for each action p
    y(i, p) <= x(i),   y(i, p) <= "an action between F i and p",   y(i, p) <= "an action between p and B i"

The three conditions on y are sums of o, so everything is linear. Exact in this model; up to `ILP_ACTIONS` actions, which take
seconds at most (at 40 mostly less, but minutes at times). The bound that it starts from, and the answer above, come from a heuristic: 1F1B's warm-up is deepened on all ranks alike, up to 2 D beyond its own and as far as the cap with moves allows, each order gets its fewest
moves, and the fastest order wins, the one with fewer moves of equal ones. From there a descent pulls one F or B of a rank some places forwards
or backwards at a time, as long as the cap can still be kept with moves, and stays with what is not slower and, of equal makespans, moves
no more. Its draws are seeded; no optimality. `parameters["effort"]` scales it, 0 leaves it out.

Paper: OptPipe: Memory- and Scheduling-Optimized Pipeline Parallelism for LLM Training, 2025.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pulp

from stagewright.planner.errors import InvalidSchedule
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate, one_stage_passes
from stagewright.planner.schedules.pipe_offload import least_held, offloads, with_moves
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, Orders, Schedule, encode, loop_placement
from stagewright.planner.schedules.sizes import check_placement, costs_of, effort_of, require, sizes_of
from stagewright.planner.simulation.kernel import compile_order, makespan

ILP_ACTIONS = 24
DESCENT_ACTIONS = 1e5  # of orders timed; about 0.1 s
ACTIONS_PER_TRY = 50  # timed in the time that one change takes beside
_MOVE_PRICE = 1e-6  # of a mean action: fewer moves among equal makespans


class Answer(NamedTuple):
    """An order of F and B for each rank and the microbatches it moves."""

    orders: tuple[Orders, ...]
    moved: tuple[frozenset[int], ...]


def opt_pipe(request: ScheduleRequest) -> Schedule:
    """Return the order and the moves of least makespan that the programme, or beyond its size the heuristic, finds."""
    sizes = sizes_of(request, "optpipe")
    ranks, count = sizes.num_ranks, sizes.num_microbatches
    placement = loop_placement(ranks)
    check_placement(request, placement, "optpipe")
    costs = costs_of(request, sizes)
    with np.errstate(divide="ignore"):
        most = np.inf if request.memory_cap is None else request.memory_cap
        caps = np.minimum(np.floor(most / costs.activation + 1e-9), count).astype(np.int64)
    require(
        bool((caps >= 1).all()),
        f"the memory cap is {most:g}, one microbatch on one rank holds {costs.activation.max():g}",
        field="memory_cap",
        hint=f"give a cap of at least {costs.activation.max():g}",
    )
    answer = deepest_warmup(costs, count, request.latency_s, caps)
    tries = int(effort_of(request, actions=DESCENT_ACTIONS) / (2 * ranks * count + ACTIONS_PER_TRY))
    answer = descended(answer, costs, request.latency_s, caps, tries=tries)
    if 2 * ranks * count <= ILP_ACTIONS:
        answer = (
            solve(costs, count, request.latency_s, caps, most_s=seconds(answer, costs, request.latency_s)) or answer
        )
    orders = tuple(
        encode(with_moves(order, rank, moved))
        for rank, (order, moved) in enumerate(zip(answer.orders, answer.moved, strict=True))
    )
    moves = sum(len(moved) for moved in answer.moved)
    return Schedule("optpipe", count, placement, orders, parameters={"moved_activations": moves})


def seconds(answer: Answer, costs: StageCosts, latency_s: float) -> float:
    """Return the makespan of an answer's orders; moves run beside compute."""
    schedule = Schedule("optpipe", len(answer.orders[0]) // 2, loop_placement(len(answer.orders)), answer.orders)
    return makespan(
        compile_order(schedule), costs.forward_s, costs.input_grad_s + costs.recompute_s, costs.weight_grad_s, latency_s
    )


def deepest_warmup(costs: StageCosts, count: int, latency_s: float, caps: np.ndarray) -> Answer:
    """Return the fastest of 1F1B's orders with warm-ups of D - d + extra forwards that the caps allow with moves."""
    ranks = costs.num_stages
    best: tuple[float, int, Answer] | None = None
    for extra in range(1 - ranks, min(count, 2 * ranks)):
        orders, moved = [], []
        for rank in range(ranks):
            warmup = max(1, min(ranks - rank + extra, count))
            order = alternate(*one_stage_passes(rank, count), warmup)
            while least_held(order) > caps[rank]:
                warmup -= 1
                order = alternate(*one_stage_passes(rank, count), warmup)
            orders.append(order)
            moved.append(offloads(order, int(caps[rank])))
        answer = Answer(tuple(orders), tuple(moved))
        value = seconds(answer, costs, latency_s), sum(len(each) for each in moved)
        if best is None or value < (best[0] * (1.0 - 1e-9), best[1]):
            best = (*value, answer)
    assert best is not None, "there is an order without warm-up"
    return best[2]


def descended(answer: Answer, costs: StageCosts, latency_s: float, caps: np.ndarray, *, tries: int) -> Answer:
    """Return the best answer met in `tries` seeded changes of one rank's order, never a slower one."""
    rng = np.random.default_rng(0)
    orders, moved = list(answer.orders), list(answer.moved)
    value = seconds(answer, costs, latency_s), sum(len(each) for each in moved)
    for rank, at, steps in zip(
        rng.integers(0, len(orders), tries).tolist(),
        rng.integers(0, len(orders[0]), tries).tolist(),
        rng.geometric(0.5, tries).tolist(),
        strict=True,
    ):
        order = _pulled(orders[rank], at, steps if at % 2 else -steps)
        if order is None or least_held(order) > caps[rank]:
            continue
        chosen = offloads(order, int(caps[rank]))
        trial = Answer((*orders[:rank], order, *orders[rank + 1 :]), (*moved[:rank], chosen, *moved[rank + 1 :]))
        try:
            found = seconds(trial, costs, latency_s), sum(len(each) for each in trial.moved)
        except InvalidSchedule:
            continue  # the ranks' orders wait for each other
        if found[0] < value[0] * (1.0 - 1e-12) or (found[0] <= value[0] * (1.0 + 1e-12) and found[1] <= value[1]):
            orders[rank], moved[rank], value = order, chosen, found
    return Answer(tuple(orders), tuple(moved))


def _pulled(order: Orders, at: int, steps: int) -> Orders | None:
    """Return the order with the action at a place pulled over up to so many of the other kind; None where it cannot move."""
    step = 1 if steps > 0 else -1
    kind, microbatch = order[at, KIND], order[at, MICROBATCH]
    end = at
    while end != at + steps and 0 <= end + step < len(order):
        other = order[end + step]
        if other[KIND] == kind or other[MICROBATCH] == microbatch:
            break
        end += step
    if end == at:
        return None
    rest = np.delete(order, at, axis=0)
    pulled: Orders = np.insert(rest, end, order[at], axis=0)
    return pulled


def solve(costs: StageCosts, count: int, latency_s: float, caps: np.ndarray, *, most_s: float) -> Answer | None:
    """Return the programme's answer, or None when the solver finds none at or below `most_s`."""
    ranks = costs.num_stages
    full_s = costs.input_grad_s + costs.weight_grad_s + costs.recompute_s
    unit_s = float(np.mean((costs.forward_s, full_s)))
    forward, backward = costs.forward_s / unit_s, full_s / unit_s
    horizon = most_s / unit_s * (1.0 + 1e-3)
    problem = pulp.LpProblem("optpipe", pulp.LpMinimize)
    end = pulp.LpVariable("M", 0.0, horizon)
    starts = {
        (rank, kind, unit): pulp.LpVariable(f"s_{rank}_{kind.name}_{unit}", 0.0, horizon)
        for rank, kind, unit in itertools.product(range(ranks), (Kind.F, Kind.B), range(count))
    }
    moves = {(rank, unit): _binary(f"x_{rank}_{unit}") for rank in range(ranks) for unit in range(count)}
    problem += end + _MOVE_PRICE * pulp.lpSum(moves.values())
    latency = latency_s / unit_s
    for rank in range(ranks):
        before = _order(problem, starts, rank, count, float(forward[rank]), float(backward[rank]), horizon)
        _remember(problem, before, moves, rank, count, int(caps[rank]))
        for unit in range(count):
            first, last = starts[rank, Kind.F, unit], starts[rank, Kind.B, unit]
            problem += last >= first + forward[rank]
            problem += end >= last + backward[rank]
            if rank > 0:
                problem += first >= starts[rank - 1, Kind.F, unit] + forward[rank - 1] + latency
            if rank + 1 < ranks:
                problem += last >= starts[rank + 1, Kind.B, unit] + backward[rank + 1] + latency
    problem.solve(pulp.HiGHS(msg=False, gapRel=0.0, threads=1))
    if problem.sol_status != pulp.LpSolutionOptimal:
        return None
    return _answer(starts, moves, ranks, count)


Before = dict[tuple[int, int], pulp.LpAffineExpression]


def _binary(name: str) -> pulp.LpVariable:
    return pulp.LpVariable(name, cat=pulp.LpBinary)


def _order(
    problem: pulp.LpProblem,
    starts: dict[tuple[int, Kind, int], pulp.LpVariable],
    rank: int,
    count: int,
    forward: float,
    backward: float,
    horizon: float,
) -> Before:
    """Add a rank's order; return "F k before B j" for all k and j, and for F and B that do not exist."""
    before: Before = {}
    for k, j in itertools.product(range(count + 1), range(-1, count)):
        if k == count or j == -1:
            before[k, j] = pulp.LpAffineExpression(constant=0)  # a last forward too many, a first backward too many
        elif k <= j:
            before[k, j] = pulp.LpAffineExpression(constant=1)
        else:
            binary = _binary(f"o_{rank}_{k}_{j}")
            before[k, j] = pulp.LpAffineExpression(binary)
            problem += starts[rank, Kind.F, k] + forward <= starts[rank, Kind.B, j] + horizon * 2 * (1 - binary)
            problem += starts[rank, Kind.B, j] + backward <= starts[rank, Kind.F, k] + horizon * 2 * binary
    for unit in range(count - 1):
        problem += starts[rank, Kind.F, unit] + forward <= starts[rank, Kind.F, unit + 1]
        problem += starts[rank, Kind.B, unit] + backward <= starts[rank, Kind.B, unit + 1]
    for k, j in itertools.product(range(count), range(count)):
        if k + 1 < count:
            problem += before[k, j] >= before[k + 1, j]
        if j + 1 < count:
            problem += before[k, j] <= before[k, j + 1]
    return before


def _remember(
    problem: pulp.LpProblem,
    before: Before,
    moves: dict[tuple[int, int], pulp.LpVariable],
    rank: int,
    count: int,
    cap: int,
) -> None:
    """Bound what each action holds."""
    for k in range(count):  # during F k
        away = []
        for i in range(k):
            is_away = _binary(f"y_{rank}_F{k}_{i}")
            problem += is_away <= moves[rank, i]
            problem += is_away <= before[k, i]
            if k == i + 1:  # a backward between F i and F k
                problem += is_away <= pulp.lpSum(before[i, j] - before[k, j] for j in range(count))
            # B i - 1 or F k + 1 between F k and B i
            problem += is_away <= (before[k, i - 1] if i > 0 else 0) + before[k + 1, i]
            away.append(is_away)
        problem += k + 1 - pulp.lpSum(1 - before[k, j] for j in range(k)) - pulp.lpSum(away) <= cap
    for j in range(count):  # during B j
        away = []
        for i in range(j + 1, count):
            is_away = _binary(f"y_{rank}_B{j}_{i}")
            problem += is_away <= moves[rank, i]
            problem += is_away <= before[i, j]
            # F i + 1 or B j - 1 between F i and B j
            problem += is_away <= before[i + 1, j] + (before[i, j - 1] if j > 0 else 0)
            if i == j + 1:  # a forward between B j and B i
                problem += is_away <= pulp.lpSum(before[k, i] - before[k, j] for k in range(count))
            away.append(is_away)
        problem += pulp.lpSum(before[k, j] for k in range(count)) - j - pulp.lpSum(away) <= cap


def _answer(
    starts: dict[tuple[int, Kind, int], pulp.LpVariable],
    moves: dict[tuple[int, int], pulp.LpVariable],
    ranks: int,
    count: int,
) -> Answer:
    orders, moved = [], []
    for rank in range(ranks):
        forwards, backwards = one_stage_passes(rank, count)
        rows = [(starts[rank, Kind.F, unit].value(), 0, forwards[unit]) for unit in range(count)]
        rows += [(starts[rank, Kind.B, unit].value(), 1, backwards[unit]) for unit in range(count)]
        orders.append(np.array([row for _, _, row in sorted(rows, key=lambda each: each[:2])], dtype=np.int32))
        moved.append(frozenset(unit for unit in range(count) if moves[rank, unit].value() > 0.5))
    return Answer(tuple(orders), tuple(moved))


FAMILY = ScheduleFamily(
    "optpipe",
    "OptPipe: Memory- and Scheduling-Optimized Pipeline Parallelism for LLM Training, 2025",
    opt_pipe,
    takes_cap=True,
    plain=False,
)
