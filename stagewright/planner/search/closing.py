"""Closing one candidate: a proof that none of its completions beats the target, or its best completion.

    mean path        the multipliers of other candidates of the order (`multipliers`): a bound in a tenth of a millisecond
    light program    stage totals without recomputation and memory: a bound in a few milliseconds
    few partitions   enumerate them (`enumeration`): exact
    whole program    levels and memory rows, same cuts
    branching        on it: whole layers, levels and workspaces (`branching`): what is found lowers the target of all that follow,
                     no node left is the proof

Cuts belong to the order and not to the candidate, so those that carried a multiplier are kept for all candidates that
share the order. Kelley's iterates are drawn towards the best point known (Wentges smoothing), which saves half of them; the
first one towards where another candidate of the order ended. A light program has a third of the whole one's columns, so a round of
it takes a tenth of the time: where the first of an order cannot be closed by it, it goes on for the paths alone, most of which bind
in the larger programs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.branching import WHOLE, Branching, Left, Split
from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.cut_program import CutProgram, Form, NamedBasis, Point
from stagewright.planner.search.enumeration import Enumeration, Judge
from stagewright.planner.search.incumbent import PROMISING, Completion, improve, staircase
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.multipliers import MeanPath, bound_by, mean_path
from stagewright.planner.search.order import Order, OrderKey
from stagewright.planner.search.path_pool import PathPool
from stagewright.planner.search.path_rows import Rules

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

MOST_PATHS = 16  # mean paths of an order
MOST_NODES = 64
LIGHT = Rules(rounds=15, smoothing=0.85, stops_below=True, near=0.0, little=0.0)
GATHER = Rules(rounds=80, smoothing=0.85, stops_below=False, near=0.0, little=1e-5)
ROUNDS = Rules(rounds=12, smoothing=0.85, stops_below=False, near=1e-3, little=1e-4)
_TOLERANCE = 1e-7
# A rounded point of a branching this far above the incumbent is not improved; of its many points those are that are better than
# all before.
_PROMISING_NODE = 1.03


@dataclass(frozen=True, eq=False)
class Closed:
    """What became of a candidate: a bound on all its completions, its best completion, why, and the work done.

    `program` is where branching can go on with one that is open. `effort` counts entries of tables that branching went
    through (`CutProgram.effort`).
    """

    bound_s: float
    reason: str
    completion: Completion | None = None
    simulated: int = 0
    num_nodes: int = 0
    effort: float = 0.0
    program: CutProgram | None = None


@dataclass(eq=False)
class Learned:
    """What candidates of one order taught: its paths, mean ones that closed some, how nodes were split by the kinds of what is
    whole, where programs of each form ended, whether paths were gathered, and of open candidates their programs and what branching left."""

    pool: PathPool
    mean_paths: list[MeanPath] = field(default_factory=list)
    trees: dict[bytes, Split] = field(default_factory=dict)
    ends: dict[Form, Point] = field(default_factory=dict)
    bases: dict[Form, NamedBasis] = field(default_factory=dict)
    has_gathered: bool = False
    programs: dict[int, CutProgram] = field(default_factory=dict)
    left: dict[tuple[int | None, bytes], Sequence[Left]] = field(default_factory=dict)


@dataclass(eq=False)
class Closer:
    """Closes candidates with what those of the same order taught."""

    limits: Limits
    learned: dict[OrderKey, Learned] = field(default_factory=dict)

    def of(self, order: Order) -> Learned:
        """Return what is known of an order."""
        if order.key not in self.learned:
            self.learned[order.key] = Learned(PathPool(order))
        return self.learned[order.key]

    def close(
        self,
        costs: CandidateCosts,
        target_s: float,
        incumbent_s: float,
        rank_layers: tuple[Longs, Longs] | None,
        judge: Judge | None = None,
    ) -> Closed:
        """Return a bound of at least `target_s`, or the best bound, with the completion its program leads to.

        Without a judge nothing is enumerated.
        """
        light = self._light(costs, target_s, rank_layers, gathers=True)
        if light.bound_s >= target_s:
            return Closed(light.bound_s, "light program", simulated=light.simulated)
        enumeration = Enumeration(costs)
        enumerated = enumeration.best(incumbent_s, judge) if judge is not None and enumeration.is_small else None
        if enumerated is not None:
            found, made = enumerated
            bound_s = incumbent_s if found is None else found.step_s
            return Closed(bound_s, "enumerated", found, light.simulated + made)
        whole = self._whole(costs, target_s, rank_layers)
        simulated = light.simulated + whole.simulated
        if whole.bound_s >= target_s:
            return Closed(whole.bound_s, "whole program", simulated=simulated)
        stairs = staircase(costs)
        starts = [_rounded(costs, whole.program.inner_point()), *([] if stairs is None else [stairs])]
        best, made = _near(costs, starts, PROMISING * incumbent_s)
        return Closed(max(light.bound_s, whole.bound_s), "open", best, simulated + made, program=whole.program)

    def close_light(self, costs: CandidateCosts, target_s: float, rank_layers: tuple[Longs, Longs] | None) -> Closed:
        """Return what the light program alone proves."""
        light = self._light(costs, target_s, rank_layers, gathers=False)
        reason = "light program" if light.bound_s >= target_s else "open"
        return Closed(light.bound_s, reason, simulated=light.simulated)

    def close_by_known(
        self, costs: CandidateCosts, target_s: float, rank_layers: tuple[Longs, Longs] | None
    ) -> Closed | None:
        """Return the bound that the multipliers of other candidates of the order give; None where it is below the target."""
        paths = self.of(costs.order).mean_paths
        if rank_layers is None or not paths:
            return None
        bound_s = bound_by(costs, paths, rank_layers, target_s * (1 + _TOLERANCE)) * (1 - _TOLERANCE)
        return Closed(bound_s, "light program") if bound_s >= target_s else None

    def close_whole(
        self,
        costs: CandidateCosts,
        bound_s: float,
        target_s: float,
        incumbent_s: float,
        rank_layers: tuple[Longs, Longs] | None,
        judge: Judge,
        most_nodes: int = MOST_NODES,
        candidate: int | None = None,
    ) -> Closed:
        """Return what branching proves of a candidate that linear programs left open with `bound_s`.

        A completion that lowers the incumbent lowers the target by as much. What is kept of a candidate by number is taken up.
        """
        simulated, promising_s = 0, _PROMISING_NODE * incumbent_s

        def complete(point: Point, is_whole: bool) -> Completion | None:
            nonlocal simulated, promising_s
            if is_whole:
                found, made = _as_it_is(costs, point), 1
            else:
                bounds = _rounded(costs, point)
                found, made = improve(costs, bounds, most_steps=0)
                if found is not None and found.step_s < promising_s:
                    promising_s = found.step_s
                    found, more = improve(costs, bounds)
                    made += more
            simulated += made
            # What is no better than the incumbent lowers no target, however long its messages wait.
            return found if found is None or found.step_s >= incumbent_s else judge(found)

        learned = self.of(costs.order)
        known = learned.pool.next_name
        program = None if candidate is None else learned.programs.pop(candidate, None)
        counted, spent = (program.simulated, program.effort) if program is not None else (0, 0.0)
        if program is None:
            program = self._program(costs, "whole", target_s, rank_layers)
            program.start_at(learned.ends.get("whole"))
        left = (candidate, program.variables)
        branching = Branching(
            program,
            target_s,
            self.limits.gap,
            complete,
            lambda: self.limits.reached() is not None,
            learned.trees.setdefault(program.wholes.kind.tobytes(), Split()),
            learned.left.pop(left, WHOLE),
        )
        proved_s = branching.run(most_nodes)
        if candidate is not None and branching.left:
            learned.left[left] = branching.left
        learned.pool.prefer(np.array(list(branching.carrying), dtype=np.int64), before=known, drops_new=True)
        simulated += program.simulated - counted
        effort = program.effort - spent
        reason = "branching" if proved_s >= branching.target_s else "open"
        return Closed(max(bound_s, proved_s), reason, branching.best, simulated, branching.num_nodes, effort)

    def _program(
        self, costs: CandidateCosts, form: Form, target_s: float, rank_layers: tuple[Longs, Longs] | None
    ) -> CutProgram:
        """Return a candidate's program, in the basis in which the last one of its order ended."""
        learned = self.of(costs.order)
        program = CutProgram(costs, learned.pool, form=form, target_s=target_s, rank_layers=rank_layers)
        program.start_from(learned.bases.get(form))
        return program

    def _keep_path(self, costs: CandidateCosts, program: CutProgram) -> None:
        learned = self.of(costs.order)
        path = mean_path(costs, learned.pool, *program.weighted())
        if path is not None:
            learned.mean_paths.insert(0, path)
            del learned.mean_paths[MOST_PATHS:]

    def _light(
        self, costs: CandidateCosts, target_s: float, rank_layers: tuple[Longs, Longs] | None, *, gathers: bool
    ) -> _Run:
        """Return the bound of the light program, and stop where a point below the target shows that it cannot pass it.

        Of the first candidate of an order that it cannot close, its paths are gathered where that is asked for.
        """
        learned = self.of(costs.order)
        known, enough_s = learned.pool.next_name, target_s * (1 + 2 * _TOLERANCE)
        program = self._program(costs, "light", enough_s, rank_layers)
        program.start_at(learned.ends.get("light"))
        bound_s, gathers = -np.inf, gathers and not learned.has_gathered
        if program.inner_s >= target_s:
            bound_s = program.improve(LIGHT)
        elif not gathers:
            return _Run(-np.inf, program)
        if bound_s < enough_s and gathers:
            learned.has_gathered = True
            bound_s = max(bound_s, program.improve(GATHER))
        bound_s = min(bound_s, enough_s) * (1 - _TOLERANCE)
        if bound_s >= target_s:
            self._keep_path(costs, program)
        return self._ended(costs, program, known, bound_s)

    def _whole(self, costs: CandidateCosts, target_s: float, rank_layers: tuple[Longs, Longs] | None) -> _Run:
        """Return the bound of the whole program after some rounds."""
        known, enough_s = self.of(costs.order).pool.next_name, target_s * (1 + 2 * _TOLERANCE)
        program = self._program(costs, "whole", enough_s, rank_layers)
        return self._ended(costs, program, known, min(program.improve(ROUNDS), enough_s) * (1 - _TOLERANCE))

    def _ended(self, costs: CandidateCosts, program: CutProgram, known: int, bound_s: float) -> _Run:
        """Keep what a program found for the other candidates of its order; paths had names below `known` before it."""
        learned = self.of(costs.order)
        learned.bases[program.form] = program.basis()
        learned.pool.prefer(program.weighted()[0], before=known, drops_new=False)
        learned.ends[program.form] = program.inner_point()
        return _Run(bound_s, program)


def _near(costs: CandidateCosts, starts: Sequence[Longs], most_s: float) -> tuple[Completion | None, int]:
    """Return the best completion of some bounds, moved where it takes at most `most_s`, and the simulations."""
    found = [improve(costs, bounds, most_steps=0)[0] for bounds in starts]
    steps = [np.inf if one is None else one.step_s for one in found]
    first = int(np.argmin(steps))
    if steps[first] > most_s:
        return found[first], len(starts)
    best, made = improve(costs, starts[first])
    return best, made + len(starts)


def _as_it_is(costs: CandidateCosts, point: Point) -> Completion | None:
    """Return a whole point with the levels that the program chose; None when it is no completion that fits."""
    counts = np.rint(_counts(costs, point)).astype(np.int64)
    layers = counts.sum(axis=2)
    ends = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(layers.sum(axis=1))))
    if (counts < 0).any() or (costs.layers_of(ends) != layers).any() or not costs.fits(counts):
        return None
    bounds = tuple(ends.tolist())
    step_s, cut = costs.trace(counts, bounds)
    return Completion(step_s, bounds, counts, cut)


def _counts(costs: CandidateCosts, point: Point) -> Floats:
    """Return layers by level, [S, K, 3], with those that are not raised at the weakest level that is allowed."""
    counts, base = point.counts, int(np.argmax(costs.levels))
    if base:
        counts[:, :, base] += counts[:, :, 0]
        counts[:, :, 0] = 0.0
    return counts


def _rounded(costs: CandidateCosts, point: Point) -> Longs:
    """Return bounds near a program's point: ranks to whole layers by largest remainders, then stages inside each rank.

    Every stage keeps at least one layer. With two replicas the stages are rounded at once.
    """
    wanted = point.layers.sum(axis=1)
    sizes = np.ones(costs.num_stages, dtype=np.int64)
    if costs.order.num_replicas > 1:
        sizes = _whole(wanted, sizes, costs.num_layers)
    else:
        held = [[slot.stage for slot in slots] for slots in costs.order.slots]
        on_rank, least = np.array([wanted[stages].sum() for stages in held]), np.array([len(stages) for stages in held])
        ranks = _whole(on_rank, least, costs.num_layers)
        for stages, total in zip(held, ranks.tolist(), strict=True):
            sizes[stages] = _whole(wanted[stages], sizes[stages], total)
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(sizes)))


@njit(cache=True)
def _whole(wanted: Floats, least: Longs, total: int) -> Longs:
    """Return integers near `wanted` that sum to `total`, each at least its least: largest remainders."""
    sizes = np.maximum(np.floor(wanted + 1e-9).astype(np.int64), least)
    while sizes.sum() < total:
        sizes[np.argmax(wanted - sizes)] += 1
    while sizes.sum() > total:
        fullest = -1
        for place in range(len(sizes)):
            over = wanted[place] - sizes[place]
            if sizes[place] > least[place] and (fullest < 0 or over < wanted[fullest] - sizes[fullest]):
                fullest = place
        sizes[fullest] -= 1
    return sizes


@dataclass(frozen=True, eq=False)
class _Run:
    bound_s: float
    program: CutProgram

    @property
    def simulated(self) -> int:
        return self.program.simulated
