"""The smallest changes of a question without an answer that give it one. Each is tried by a search; none is guessed.

Tried one at a time: every pin, forbid and tie left out, all recomputation levels, all ZeRO stages, all schedules, less
headroom, devices with more memory, more devices, a smaller batch. More devices and a smaller batch are doubled and halved
until something fits, then bisected; between two steps of a bisection nothing is claimed. The memory that would do is
the least peak over the whole space (`objectives.min_max_memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from stagewright.planner.catalog.clusters import resolve_cluster
from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.job import SearchSpace, TrainingJob
from stagewright.planner.documents.outcome import PlanOutcome, Relaxation
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import Recompute
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.objectives.least_step import ANY_GAP, Tally, fitting
from stagewright.planner.objectives.min_max_memory import peak_of, solve_min_max_memory
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.space import divisors
from stagewright.planner.search.stage_answer import solve_tied

GIB = 2.0**30
MOST_GROWTH = 256


@dataclass(frozen=True)
class LeastMemory:
    """The plan of least peak found for a problem whose devices are too small, and a proved bound on any peak."""

    plan: Plan
    bound_bytes: float


def least_memory(problem: Problem, limits: Limits) -> LeastMemory | None:
    """Return the plan that comes closest to fitting; None when the space is empty or nothing was found in time."""
    roomy = on_larger_devices(problem)
    outcome = solve_min_max_memory(roomy, replace(limits, top=0, progress=None))
    if outcome.plan is None or outcome.bound is None:
        return None
    plan = outcome.plan.model_copy(update={"cluster": problem.cluster, "job": problem.job, "certificate": None})
    return LeastMemory(plan, outcome.bound)


def on_larger_devices(problem: Problem) -> Problem:
    """Return the problem on devices with room for everything (a million times their memory)."""
    job = problem.job.model_copy(update={"step_deadline_s": None})
    return Problem(
        problem.profile, without_memory_limit(problem.cluster), job, problem.num_devices, problem.only_counts
    )


def without_memory_limit(cluster: Cluster) -> Cluster:
    """Return the cluster with devices that hold anything (a million times their memory)."""
    groups = tuple(
        group.model_copy(
            update={"device": group.device.model_copy(update={"memory_bytes": group.device.memory_bytes * 1e6})}
        )
        for group in cluster.groups
    )
    return cluster.model_copy(update={"groups": groups})


def relaxations(problem: Problem, limits: Limits, least: LeastMemory | None) -> tuple[Relaxation, ...]:
    """Return the changes that were found to help, those of the job first; a limit leaves out the rest."""
    found: list[Relaxation] = []
    for change, job in _loosened(problem.job):
        outcome = _fits(problem, limits, job=job)
        if outcome is not None:
            found.append(_relaxation(change, outcome))
    if least is not None:
        found += _memory(problem, least)
    more = _more_devices(problem, limits)
    if more is not None:
        found.append(more)
    smaller = _smaller_batch(problem, limits)
    if smaller is not None:
        found.append(smaller)
    return tuple(found)


def _relaxation(change: str, outcome: PlanOutcome) -> Relaxation:
    assert outcome.plan is not None
    return Relaxation(change=change, step_time_s=outcome.plan.prediction.step_time_s)


def _fits(
    problem: Problem,
    limits: Limits,
    *,
    job: TrainingJob | None = None,
    cluster: Cluster | None = None,
    num_devices: int | None = None,
) -> PlanOutcome | None:
    """Return a plan for the changed question; None when there is none, or a limit came first."""
    if limits.reached() is not None:
        return None
    changed = Problem(
        problem.profile, cluster or problem.cluster, job or problem.job, num_devices or problem.num_devices
    )
    solve = _fitting_tied if changed.job.space.ties else fitting
    try:
        outcome = solve(changed, limits, Tally())
    except InvalidArgument:
        return None
    return outcome if outcome.plan is not None else None


def _fitting_tied(problem: Problem, limits: Limits, tally: Tally) -> PlanOutcome:
    """Return some plan that fits and keeps tied layers together, or the proof that none does."""
    return tally.add(solve_tied(problem, replace(limits, top=0, gap=ANY_GAP, progress=None)))


def _loosened(job: TrainingJob) -> Iterator[tuple[str, TrainingJob]]:
    """Yield the job with one constraint less, and the change in words."""
    space = job.space
    for name, value in space.pins:
        if value is not None:
            yield f"{name} not pinned to {value}", _in_space(job, pins=space.pins.model_copy(update={name: None}))
    for index, item in enumerate(space.forbids):
        left = space.forbids[:index] + space.forbids[index + 1 :]
        yield f"{item.name}{f'={item.value}' if item.value else ''} not forbidden", _in_space(job, forbids=left)
    if space.target is not None:
        yield f"target {space.target} not required", _in_space(job, target=None)
    for index, pair in enumerate(space.equal):
        yield f"{pair[0]} and {pair[1]} not tied", _in_space(job, equal=space.equal[:index] + space.equal[index + 1 :])
    for index, names in enumerate(space.ties):
        yield f"{' and '.join(names)} not tied", _in_space(job, ties=space.ties[:index] + space.ties[index + 1 :])
    missing = [level for level in Recompute if level not in space.recompute]
    if missing:
        yield (
            f"recompute {' and '.join(level.value for level in missing)} allowed",
            _in_space(job, recompute=tuple(Recompute)),
        )
    for zero in (1, 2, 3):
        if zero > max(space.zero):
            yield f"zero {zero} allowed", _in_space(job, zero=(*space.zero, zero))
    if space.schedules:
        yield "every schedule allowed", _in_space(job, schedules=())


def _in_space(job: TrainingJob, **changes: object) -> TrainingJob:
    space: SearchSpace = job.space.model_copy(update=changes)
    return job.model_copy(update={"space": space})


def _memory(problem: Problem, least: LeastMemory) -> list[Relaxation]:
    """Return how much memory, and how little headroom, the plan of least peak needs."""
    peak, device = peak_of(least.plan), problem.cluster.groups[0].device
    room = 1.0 - problem.job.space.memory_headroom
    step_s = least.plan.prediction.step_time_s
    proof = f"; no plan needs less than {least.bound_bytes / room / GIB:.2f} GiB"
    found = [
        Relaxation(
            change=f"devices with {peak / room / GIB:.2f} GiB instead of {device.memory_bytes / GIB:.2f} GiB{proof}",
            step_time_s=step_s,
        )
    ]
    if peak <= device.memory_bytes:
        most = int((1.0 - peak / device.memory_bytes) * 1000) / 1000
        found.append(
            Relaxation(
                change=f"memory_headroom of at most {most:.3f} instead of {problem.job.space.memory_headroom:.3f}",
                step_time_s=step_s,
            )
        )
    return found


def _more_devices(problem: Problem, limits: Limits) -> Relaxation | None:
    """Return the fewest devices tried that hold a plan: devices of a node first, then nodes."""
    cluster = problem.cluster
    if cluster.is_mixed:
        return None
    outcomes: dict[int, PlanOutcome | None] = {}

    def fits(devices: int) -> bool:
        if devices not in outcomes:
            larger = cluster if devices <= cluster.num_devices else grown(cluster, devices)
            outcomes[devices] = None if larger is None else _fits(problem, limits, cluster=larger, num_devices=devices)
        return outcomes[devices] is not None

    unit = cluster.groups[0].devices_per_node if problem.num_devices >= cluster.groups[0].devices_per_node else 1
    count = _first(fits, problem.num_devices, unit)
    outcome = None if count is None else outcomes[count]
    if outcome is None:
        return None
    return _relaxation(f"{count} devices instead of {problem.num_devices}", outcome)


def _first(fits: Callable[[int], bool], base: int, unit: int) -> int | None:
    """Return base + k unit that fits, k by doubling and bisection; None up to MOST_GROWTH times the base."""
    steps = 1
    while not fits(base + steps * unit):
        if base + steps * unit >= MOST_GROWTH * base:
            return None
        steps = max(steps * 2, base // unit)
    low, high = steps // 2, steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(base + middle * unit) else (middle, high)
    return base + high * unit


def grown(cluster: Cluster, num_devices: int) -> Cluster | None:
    """Return the cluster with more nodes of its kind; None where its network is unknown.

    A device of the catalogue stands in the nodes and on the network it usually comes with.
    """
    group = cluster.groups[0]
    per_node = group.devices_per_node
    if len(group.links) > 1 and group.num_nodes > 1:
        if num_devices % per_node:
            return None
        links = (*group.links[:-1], group.links[-1].model_copy(update={"num_devices": num_devices}))
        larger = group.model_copy(update={"num_nodes": num_devices // per_node, "links": links})
        return cluster.model_copy(update={"groups": (larger,)})
    try:
        most = resolve_cluster(f"{group.device.name}:8x1").groups[0].devices_per_node
        text = f"{num_devices}x1" if num_devices <= most else f"{most}x{-(-num_devices // most)}"
        return resolve_cluster(f"{group.device.name}:{text}")
    except InvalidArgument:
        return None


def _smaller_batch(problem: Problem, limits: Limits) -> Relaxation | None:
    """Return the largest divisor of the global batch with a plan, when one sample has one."""
    batches = divisors(problem.job.global_batch)[:-1]
    best: tuple[int, PlanOutcome] | None = None
    low, high = 0, len(batches)
    while low < high:
        middle = (low + high) // 2 if best is not None else 0
        outcome = _fits(problem, limits, job=problem.job.model_copy(update={"global_batch": batches[middle]}))
        if outcome is None:
            high = middle
        else:
            best, low = (batches[middle], outcome), middle + 1
    if best is None:
        return None
    return _relaxation(f"a global batch of {best[0]} instead of {problem.job.global_batch}", best[1])
