"""A certificate's bound proved again as far as arithmetic alone goes, and the rest put to the test.

The declared space is enumerated anew. For D ranks, T microbatches, n_k layers of class k with t_k seconds a microbatch
(forward and both gradients) and u_k seconds at the step's end, no plan of a configuration takes less than

    area     (T sum_k n_k t_k + sum_k n_k u_k) / D            any order: all work, shared by all ranks
    layer    T max_k t_k                                      any order: one rank runs a layer (half with two replicas)
    ranks    x / (1 - (1 - 1/T)^D),  x = sum_k n_k t_k        one chunk, whole backwards: rank r waits for the ranks above
                                                              it, M >= x_1 + .. + x_{r-1} + T x_r; eliminate the x_r
    uniform  x (T + D - 1) / D                                GPipe, and 1F1B with T > D
    serial   T x                                              one rank works at a time

Candidates whose bound here reaches the certificate's are proved again, and those whose ranks cannot hold all layers when each takes
as many as the bound and its memory let it (`rank_filling`). For the others the certificate rests on path cuts
in linear programs, whose multipliers it does not keep. Those are attacked: the most promising are completed with balanced
stages and simulated, and one step below the bound refutes the certificate. Costs are those of the cost model, checked
against the ones that plans are scored with on a sample of configurations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument, InvalidDocument, InvalidSchedule
from stagewright.planner.planned_devices import rank_devices
from stagewright.planner.prediction import evaluate
from stagewright.planner.search.incumbent import balanced
from stagewright.planner.search.pricing import NUM_MICROBATCHES, PP, Priced, configuration_of
from stagewright.planner.search.problem import Candidate, Partition, Problem
from stagewright.planner.search.rank_filling import RankCosts, before
from stagewright.planner.search.space import FamilyRule, schedule_sizes

TOLERANCE = 1e-6
NUM_ATTACKED = 24
NUM_COMPARED = 32


@dataclass(frozen=True)
class Reproof:
    """What was proved again.

    Parameters
    ----------
    candidates : of the declared space that memory admits.
    reproved : whose bound by arithmetic reaches the certificate's.
    programs : whose bound rests on linear programs.
    attacked : of these, completed and simulated without coming below the bound.
    """

    candidates: int = 0
    reproved: int = 0
    programs: int = 0
    attacked: int = 0

    def __add__(self, other: Reproof) -> Reproof:
        """Return what was proved again of two parts of a space."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Reproof(*(mine + theirs for mine, theirs in pairs))


def reprove_equal_degrees(problem: Problem, bound_s: float) -> Reproof:
    """Return what of a bound holds by arithmetic over the space of equal degrees on all stages.

    Raises InvalidDocument where a plan is below the bound.
    """
    _compare_prices(problem)
    priced = problem.priced.take(np.flatnonzero(_memory_admits(problem, problem.priced)))
    open_ones: list[tuple[float, int, FamilyRule, int]] = []
    candidates = 0
    for row in range(len(priced)):
        ranks, count = int(priced.shape[row, PP]), int(priced.shape[row, NUM_MICROBATCHES])
        sizes = schedule_sizes(problem.rules, problem.job.space, ranks, count, problem.profile.num_layers)
        for rule, chunks in sizes:
            candidates += 1
            least_s = least_step_s(priced, row, problem.classes.counts, rule)
            if least_s < bound_s * (1 - TOLERANCE):
                open_ones.append((least_s, row, rule, chunks))
    reached = still_open(problem, priced, [item[1:] for item in open_ones], bound_s * (1 - TOLERANCE))
    open_ones = [item for item, is_open in zip(open_ones, reached, strict=True) if is_open]
    attacked = _attack(problem, priced, open_ones, bound_s)
    return Reproof(candidates, candidates - len(open_ones), len(open_ones), attacked)


def least_step_s(priced: Priced, row: int, numbers: npt.NDArray[np.int32], rule: FamilyRule) -> float:
    """Return the bound of one candidate by the formulas above."""
    ranks, count = int(priced.shape[row, PP]), int(priced.shape[row, NUM_MICROBATCHES])
    each = priced.time_s[row]
    whole = float(each @ numbers)
    bounds = [(count * whole + float(priced.step_s[row] @ numbers)) / ranks, count * each.max() / rule.num_replicas]
    if rule.bound in ("uniform", "gpipe", "fused"):
        bounds.append(whole / (1.0 - (1.0 - 1.0 / count) ** ranks))
    if rule.bound == "gpipe" or (rule.bound == "uniform" and count > ranks):
        bounds.append(whole * (count + ranks - 1) / ranks)
    if rule.bound == "serial":
        bounds.append(whole * count)
    return float(max(bounds))


def still_open(
    problem: Problem, priced: Priced, found: Sequence[tuple[int, FamilyRule, int]], most_s: float
) -> list[bool]:
    """Tell of candidates (row, family, chunks) which of them hold all layers within a step when their ranks are filled.

    With one chunk rank after rank, with several all ranks at once, each with one microbatch, since one is everywhere when
    its first backward begins. Two replicas of a stage are not filled.
    """
    alike: dict[tuple[int, int, bool, bool, str], list[int]] = {}
    for place, (row, rule, chunks) in enumerate(found):
        is_single = chunks == 1
        live = rule.live if is_single else "one"
        key = (int(priced.shape[row, PP]), rule.num_replicas, is_single, is_single and rule.split, live)
        alike.setdefault(key, []).append(place)
    is_open = [True] * len(found)
    for (ranks, replicas, is_single, _, _), places in alike.items():
        if replicas > 1:
            continue
        rule, own = found[places[0]][1], priced.take(np.array([found[place][0] for place in places]))
        counts, of_layer = own.shape[:, NUM_MICROBATCHES].astype(np.int64), problem.classes.of_layer
        costs = partial(
            RankCosts.of,
            problem,
            own,
            num_microbatches=counts,
            room_bytes=problem.capacity_bytes - problem.base_bytes,
            heads=(before(own.forward_s[:, of_layer]), before(own.time_s[:, of_layer])),
            split=rule.split,
        )
        if is_single:
            lives = np.array([rule.least_live(ranks, count) for count in counts.tolist()])
            reach = costs(live=lives[:, 0]).reach(most_s)[:, :1]
            for rank in range(1, ranks):
                reach = np.take_along_axis(costs(live=lives[:, rank]).reach(most_s), reach, axis=1)
            reached = reach[:, 0] >= problem.profile.num_layers
        else:
            reached = costs(live=1.0).hold_all(most_s, ranks)
        for place, holds in zip(places, reached.tolist(), strict=True):
            is_open[place] = holds
    return is_open


def _memory_admits(problem: Problem, priced: Priced) -> npt.NDArray[np.bool_]:
    """Return which configurations hold all states and one microbatch at its lightest, spread evenly, [n]."""
    room = (problem.capacity_bytes - problem.base_bytes) * (1 + 1e-9)
    allowed, numbers = list(problem.levels), problem.classes.counts
    lightest = priced.kept_bytes[:, allowed].min(axis=1)
    alone = (priced.kept_bytes + priced.workspace_bytes)[:, allowed].min(axis=1)
    spread = ((priced.state_bytes + lightest) @ numbers) / priced.shape[:, PP] <= room
    return np.asarray(spread & ((priced.state_bytes + alone).max(axis=1) <= room))


def _compare_prices(problem: Problem) -> None:
    """Raise InvalidDocument where the search's prices are not those that plans are scored with."""
    priced, classes = problem.priced, problem.classes
    if not len(priced):
        return
    for row in np.unique(np.linspace(0, len(priced) - 1, NUM_COMPARED).astype(int)).tolist():
        scored = problem.costs(configuration_of(priced.shape[row]))
        for name in ("forward_s", "input_grad_s", "weight_grad_s", "split_excess_s"):
            ours, theirs = getattr(priced, name)[row][classes.of_layer], getattr(scored, name)
            if not np.allclose(ours, theirs, rtol=1e-9, atol=0.0):
                raise InvalidDocument(
                    f"{configuration_of(priced.shape[row])}: the search priced {float(ours.sum())!r} {name}, plans are "
                    f"scored with {float(theirs.sum())!r}",
                    field="certificate.space",
                )


def _attack(
    problem: Problem, priced: Priced, open_ones: list[tuple[float, int, FamilyRule, int]], bound_s: float
) -> int:
    """Complete and simulate the candidates of least bound; raise InvalidDocument for a plan below `bound_s`."""
    attacked = 0
    for _, row, rule, chunks in sorted(open_ones, key=lambda item: item[0]):
        if attacked == NUM_ATTACKED:
            break
        candidate = Candidate(configuration_of(priced.shape[row]), rule, chunks)
        try:
            stages = problem.order(candidate).num_stages
            bounds = tuple(balanced(priced.time_s[row][problem.classes.of_layer], stages).tolist())
            partitions = [Partition(bounds, (level,) * problem.profile.num_layers) for level in problem.levels]
            plans = [problem.plan(candidate, one, "exact") for one in partitions if problem.fits(candidate, one)]
        except (InvalidArgument, InvalidSchedule):
            continue
        for plan in plans:
            scored = plan.model_copy(update={"prediction": evaluate(plan, problem.profile).prediction})
            refuse_plan_below(scored, candidate.summary, bound_s)
        attacked += 1
    return attacked


def refuse_plan_below(plan: Plan, summary: str, bound_s: float) -> None:
    """Raise InvalidDocument for a scored plan of the declared space that takes less than a certificate's bound."""
    step_s = plan.prediction.step_time_s
    if step_s < bound_s * (1 - TOLERANCE):
        raise InvalidDocument(
            f"{summary} takes {step_s!r} s, the certificate says nothing is below {bound_s!r}",
            field="certificate.bound",
        )


def rank_rooms(plan: Plan) -> list[float]:
    """Return the bytes that a plan may use of a device of each pipeline rank."""
    return [device.memory_bytes * (1.0 - plan.job.space.memory_headroom) for device in rank_devices(plan)]
