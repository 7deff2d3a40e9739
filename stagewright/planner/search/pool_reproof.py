"""The bound of plans whose stages differ proved again by arithmetic, and the rest put to the test.

Pools along the pipeline and the choices of each are enumerated anew (`pool_space.skeletons`), and the ranks of each product of
choices are filled one after the other as far as the bound lets them (`rank_filling`), with the least that a layer takes on any pool
before a microbatch comes. Stages that form no chain wait for nothing. Where the last rank does not reach the last layer, the
product is proved again. Prices, and which choices others undercut, are those of the search.

Products of choices that reach it all the same rest on path cuts (`stage_closing`). They are attacked: the most promising
are cut at the least X that they reach the end with, completed and simulated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.pool_space import Alike, PoolSpace, Skeleton
from stagewright.planner.search.pricing import Priced
from stagewright.planner.search.rank_filling import Heads, RankCosts, before
from stagewright.planner.search.reproof import NUM_ATTACKED, TOLERANCE, Reproof, refuse_plan_below
from stagewright.planner.search.space import FamilyRule
from stagewright.planner.search.stage_candidate import StageCandidate

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

_HALVINGS = 30


@dataclass(frozen=True)
class _Open:
    """A product of choices that arithmetic leaves open; `guess_s` is its work shared by all ranks, and the pipeline's ends."""

    guess_s: float
    skeleton: Skeleton
    rule: FamilyRule
    chosen: tuple[int, ...]


@dataclass(eq=False)
class PoolReproof:
    """The check of one space of pools against a bound."""

    space: PoolSpace
    bound_s: float
    _heads: dict[int, Heads] = field(default_factory=dict)
    _reaches: dict[tuple[str, int, int, Alike, bool, bool, float], Longs] = field(default_factory=dict)

    def run(self) -> Reproof:
        """Return what holds by arithmetic; raises InvalidDocument for a plan below the bound."""
        candidates, reproved = 0, 0
        left: list[_Open] = []
        for skeleton in self.space.skeletons():
            numbers = [len(rows) for _, _, rows in self.space.rows(skeleton)]
            if not all(numbers):
                continue
            rules = self.space.rules_for(skeleton)
            candidates += int(np.prod(numbers)) * len(rules)
            for kind in sorted({(rule.split, rule.live) for rule in rules}):
                alike = [rule for rule in rules if (rule.split, rule.live) == kind]
                is_open = self.reached(skeleton, alike[0]) >= self._num_layers
                reproved += int((~is_open).sum()) * len(alike)
                found = self._most_promising(skeleton, is_open)
                left += [_Open(guess_s, skeleton, rule, chosen) for guess_s, chosen in found for rule in alike]
            left = sorted(left, key=lambda one: one.guess_s)[:NUM_ATTACKED]
        return Reproof(candidates, reproved, candidates - reproved, self._attack(left))

    @property
    def _num_layers(self) -> int:
        return self.space.problem.profile.num_layers

    # ---- arithmetic ------------------------------------------------------------------------------------------------

    def reached(self, skeleton: Skeleton, rule: FamilyRule) -> Longs:
        """Return how many layers each product of choices places below the bound, an axis for each pool."""
        reached = np.zeros((), dtype=np.int64)
        live = self._live(skeleton, rule)
        for pool, first in enumerate(np.cumsum([0, *skeleton.ranks[:-1]]).tolist()):
            reach = self.reach_of_rank(skeleton, pool, rule.split, live[first])
            for rank in range(first + 1, first + skeleton.ranks[pool]):
                reach = np.take_along_axis(self.reach_of_rank(skeleton, pool, rule.split, live[rank]), reach, axis=1)
            reached = np.moveaxis(reach[:, reached], 0, -1)
        return reached

    def reach_of_rank(self, skeleton: Skeleton, pool: int, split: bool, live: float) -> Longs:
        """Return the layer that one rank of a pool reaches from each layer, for each of its choices, [n, L + 1]."""
        size = skeleton.pools[pool].num_devices // skeleton.ranks[pool]
        key = (skeleton.pools[pool].group, size, skeleton.samples, skeleton.alike, split, skeleton.graph is None, live)
        if key not in self._reaches:
            choices, priced, rows = self.space.rows(skeleton)[pool]
            costs = self._costs(skeleton, priced.take(rows), choices.room_bytes, split, live)
            self._reaches[key] = costs.reach(self.bound_s * (1 - TOLERANCE))
        return self._reaches[key]

    def _live(self, skeleton: Skeleton, rule: FamilyRule) -> list[float]:
        """Return how many microbatches each pipeline rank holds at once, at least."""
        if skeleton.graph is not None:
            return [1.0] * skeleton.num_ranks
        return [float(live) for live in rule.least_live(skeleton.num_ranks, self._count(skeleton))]

    def _costs(self, skeleton: Skeleton, priced: Priced, room_bytes: float, split: bool, live: float) -> RankCosts:
        return RankCosts.of(
            self.space.problem,
            priced,
            num_microbatches=self._count(skeleton),
            live=live,
            room_bytes=room_bytes,
            heads=self._heads_of(skeleton),
            split=split,
        )

    def _heads_of(self, skeleton: Skeleton) -> Heads:
        """Return the least seconds of a microbatch on the layers before each layer: there, and there and back, [L + 1] each."""
        if skeleton.graph is not None:
            return np.zeros(self._num_layers + 1), np.zeros(self._num_layers + 1)
        if skeleton.samples not in self._heads:
            of_layer = self.space.problem.classes.of_layer
            least = np.full((2, self._num_layers), np.inf)
            for name, size in self._sizes:
                priced, of_row = self.space.choices[name].priced(size)
                own = priced.take(np.flatnonzero(of_row == skeleton.samples))
                for place, seconds in enumerate((own.forward_s, own.least_time_s(self.space.problem.levels))):
                    least[place] = np.minimum(least[place], seconds.min(axis=0, initial=np.inf)[of_layer])
            there, back = before(least)
            self._heads[skeleton.samples] = (there, back)
        return self._heads[skeleton.samples]

    @cached_property
    def _sizes(self) -> set[tuple[str, int]]:
        """Every number of devices that a rank of every pool may have."""
        pools = {pool for row in self.space.sequences for pool in row}
        return {(pool.group, pool.num_devices // count) for pool in pools for count in pool.rank_counts}

    def _count(self, skeleton: Skeleton) -> int:
        return self.space.problem.job.global_batch // skeleton.samples

    # ---- the attack ------------------------------------------------------------------------------------------------

    def _most_promising(
        self, skeleton: Skeleton, is_open: npt.NDArray[np.bool_]
    ) -> list[tuple[float, tuple[int, ...]]]:
        """Return the open products of least guess: all work shared by all ranks, and a pipeline that fills and drains."""
        if not is_open.any():
            return []
        numbers = self.space.problem.classes.counts
        rate: Floats = np.zeros(())
        for ranks, (_, priced, rows) in zip(skeleton.ranks, self.space.rows(skeleton), strict=True):
            rate = rate[..., None] + ranks / (priced.take(rows).least_time_s(self.space.problem.levels) @ numbers)
        guesses = (self._count(skeleton) + skeleton.num_ranks - 1) / rate[is_open]
        places = np.argwhere(is_open)
        chosen = np.argsort(guesses, kind="stable")[:NUM_ATTACKED].tolist()
        return [(float(guesses[index]), tuple(places[index].tolist())) for index in chosen]

    def _attack(self, left: list[_Open]) -> int:
        """Complete and simulate; raises InvalidDocument for a plan below the bound. Returns how many had a schedule."""
        attacked = 0
        for one in left:
            rows = self.space.rows(one.skeleton)
            at = [int(rows[pool][2][place]) for pool, place in enumerate(one.chosen)]
            candidate = self.space.candidate(one.skeleton, at, one.rule)
            if candidate is None:
                continue
            attacked += 1
            partition = candidate.complete(self._even_cuts(one, at, candidate))
            if partition is not None:
                plan = candidate.scored(partition, "exact")
                refuse_plan_below(plan, candidate.summary, self.bound_s)
        return attacked

    def _even_cuts(self, one: _Open, at: list[int], candidate: StageCandidate) -> list[int]:
        """Return where stages begin when every rank is filled up to the same seconds, the least that hold all layers."""
        skeleton = one.skeleton
        live = iter(self._live(skeleton, one.rule))
        costs = [
            self._costs(skeleton, priced.take(np.array([row])), choices.room_bytes, one.rule.split, next(live))
            for (choices, priced, _), row, ranks in zip(self.space.rows(skeleton), at, skeleton.ranks, strict=True)
            for _ in range(ranks)
        ]
        low_s, high_s = self.bound_s, 64.0 * max(self.bound_s, one.guess_s)
        for _ in range(_HALVINGS):
            middle_s = 0.5 * (low_s + high_s)
            _, reached = _filled([cost.reach(middle_s)[0] for cost in costs], candidate)
            low_s, high_s = (low_s, middle_s) if reached >= self._num_layers else (middle_s, high_s)
        cuts, _ = _filled([cost.reach(high_s)[0] for cost in costs], candidate)
        return [*cuts, self._num_layers]


def _filled(rows: list[Longs], candidate: StageCandidate) -> tuple[list[int], int]:
    """Return where stages begin, each as late as the stage before reaches and the windows let it, and what the last one reaches."""
    cuts = [0]
    for row, (low, high) in zip(rows[:-1], candidate.windows[1:-1].tolist(), strict=True):
        cut = min(max(int(row[cuts[-1]]), low, cuts[-1] + 1), high)
        while cut in candidate.whole and cut > cuts[-1] + 1:
            cut -= 1
        cuts.append(cut)
    return cuts, int(rows[-1][cuts[-1]])
