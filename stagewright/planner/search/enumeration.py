"""All completions of a small candidate, in order of bound: exact where there are few enough.

Every partition is bounded by its simulation without recomputation (makespans never fall when a stage gets longer), or by
the longest work of a rank where that passes the best known, and partitions are completed in that order until the bound
passes the best found. What is left is to choose levels: ranks that share stages form a component, each component has a
list of level choices that no other choice beats in the seconds of every stage, and a search over components, bounded by
simulating the undecided ones at their least, finds the best product. With one stage to a component there is one choice
and nothing to search.

Exact, given that messages never wait. Complexity: C(L - 1, S - 1) simulations, then products of the choices. Where memory
binds and the assignments of levels are many, it gives up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from math import comb, prod

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.incumbent import Completion
from stagewright.planner.search.rank_slots import RankSlots

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

Judge = Callable[[Completion], Completion]

MOST_PARTITIONS = 12_000
MOST_ACTIONS = 20_000_000  # simulated for all partitions
MOST_LEVELS = 20_000  # assignments of levels that are looked at
_CHUNK = 1024  # partitions or assignments that are looked at at once


class _TooMany(Exception):
    """More assignments of levels than are worth looking at."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Levels of a component's stages: counts [stages, K, 3] and the seconds they add to each stage's backward."""

    counts: Longs
    seconds: Floats


@dataclass(eq=False)
class Enumeration:
    """The enumeration of one candidate's completions."""

    costs: CandidateCosts
    _num_levels: int = 0  # assignments looked at so far
    _slots: dict[tuple[int, ...], RankSlots] = field(default_factory=dict)
    _known: dict[tuple[tuple[int, ...], bytes], list[Choice]] = field(default_factory=dict)

    @property
    def is_small(self) -> bool:
        """Tell whether there are few enough partitions to enumerate."""
        costs = self.costs
        partitions = comb(costs.num_layers - 1, costs.num_stages - 1)
        return partitions <= MOST_PARTITIONS and partitions * costs.order.num_actions <= MOST_ACTIONS

    @cached_property
    def components(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """Ranks that share stages, and their stages."""
        groups: list[tuple[set[int], set[int]]] = []
        for rank, slots in enumerate(self.costs.order.slots):
            ranks, stages = {rank}, {slot.stage for slot in slots}
            for other in [group for group in groups if group[1] & stages]:
                groups.remove(other)
                ranks |= other[0]
                stages |= other[1]
            groups.append((ranks, stages))
        return tuple((tuple(sorted(ranks)), tuple(sorted(stages))) for ranks, stages in groups)

    def best(self, below_s: float, judge: Judge) -> tuple[Completion | None, int] | None:
        """Return the best completion of less than `below_s`, if any, and how many simulations it took.

        None when memory leaves too many assignments of levels to look at. `judge` returns a completion with its step on
        links that messages wait for; never less than before.
        """
        bounds, values, simulated = self._bounded(below_s)
        best: Completion | None = None
        for place in np.argsort(values, kind="stable").tolist():
            if values[place] >= below_s:
                break
            try:
                found, tries = self._best_levels(bounds[place], below_s, judge)
            except _TooMany:
                return None
            simulated += tries
            if found is not None:
                best, below_s = found, found.step_s
        return best, simulated

    def _bounded(self, below_s: float) -> tuple[list[tuple[int, ...]], Floats, int]:
        """Return all partitions with a bound of each, and how many were simulated.

        The bound is the longest work of a rank, and where that is below `below_s`, the step at the weakest level.
        """
        costs = self.costs
        layers, stages = costs.num_layers, costs.num_stages
        bounds = [(0, *inner, layers) for inner in combinations(range(1, layers), stages - 1)]
        weakest = _at_level(np.eye(costs.runs.num_runs, dtype=np.int64), int(np.argmax(costs.levels)))
        nothing = costs.stage_costs(np.zeros_like(weakest[:1]))
        each = costs.stage_costs(weakest) - nothing  # of a layer of each run, [3, K]
        microbatches = costs.order.key.num_microbatches / costs.order.num_replicas
        values, simulated = [], 0
        for first in range(0, len(bounds), _CHUNK):
            some = np.array(bounds[first : first + _CHUNK], dtype=np.int64)
            on_stage = costs.layers_of(some)
            times = np.moveaxis(on_stage @ each.T + nothing[:, 0], -1, -2)
            tails = costs.tails(on_stage, some)
            work_s = microbatches * costs.slots.on_ranks(times.sum(axis=-2)).sum(axis=-1) + tails
            found = work_s.max(axis=-1) * (1 - 1e-12) + costs.step_overhead_s
            near = np.flatnonzero(found < below_s)
            makespans = costs.order.makespans(times[near], costs.hop_seconds(some[near]), tails[near])
            found[near] = makespans + costs.step_overhead_s
            simulated += len(near)
            values.append(found)
        return bounds, np.concatenate(values), simulated

    def _best_levels(self, bounds: tuple[int, ...], below_s: float, judge: Judge) -> tuple[Completion | None, int]:
        """Return the completion of a partition of least step, if below `below_s`, and the simulations."""
        costs = self.costs
        layers = costs.layers_of(bounds)
        choices: list[list[Choice]] = []
        for ranks, stages in self.components:
            found = self._choices(ranks, stages, layers)
            if not found:
                return None, 0
            choices.append(found)
        hops, tails = costs.hop_seconds(bounds), costs.tails(layers, bounds)
        base = costs.stage_costs(_at_level(layers, 0))
        parts = [list(stages) for _, stages in self.components]
        least = np.zeros(costs.num_stages)
        for part, found in zip(parts, choices, strict=True):
            least[part] = np.min([choice.seconds for choice in found], axis=0)
        open_places = [place for place, found in enumerate(choices) if len(found) > 1]
        best: Completion | None = None
        tries = 0

        def descend(depth: int, seconds: Floats, picked: list[int]) -> None:
            nonlocal best, tries
            tries += 1
            times = base.copy()
            times[1] += seconds
            value = costs.order.makespan(times, hops, tails) + costs.step_overhead_s
            if value >= (below_s if best is None else best.step_s):
                return
            if depth == len(open_places):
                found = judge(self._completion(bounds, choices, picked))
                if found.step_s < (below_s if best is None else best.step_s):
                    best = found
                return
            place = open_places[depth]
            for index, choice in enumerate(choices[place]):
                picked[place] = index
                chosen = seconds.copy()
                chosen[parts[place]] = choice.seconds
                descend(depth + 1, chosen, picked)
            picked[place] = 0

        descend(0, least, [0] * len(choices))
        return best, tries

    def _completion(self, bounds: tuple[int, ...], choices: list[list[Choice]], picked: list[int]) -> Completion:
        costs = self.costs
        counts = np.zeros((costs.num_stages, costs.runs.num_runs, 3), dtype=np.int64)
        for (_, stages), found, index in zip(self.components, choices, picked, strict=True):
            counts[list(stages)] = found[index].counts
        value, cut = costs.trace(counts, bounds)
        return Completion(value, bounds, counts, cut)

    def _choices(self, ranks: tuple[int, ...], stages: tuple[int, ...], layers: Longs) -> list[Choice]:
        """Return the level choices of a component that fit and that no other one beats on every stage.

        Partitions share most of their stages, so choices are kept by what the component's stages hold.
        """
        key = (ranks, layers[list(stages)].tobytes())
        if key not in self._known:
            self._known[key] = self._make_choices(ranks, stages, layers)
        return self._known[key]

    def _make_choices(self, ranks: tuple[int, ...], stages: tuple[int, ...], layers: Longs) -> list[Choice]:
        base = int(np.argmax(self.costs.levels))
        weakest = _at_level(layers[list(stages)], base)
        if self._fit(ranks, stages, weakest[None])[0]:
            self._num_levels += 1
            return self._as_choices(weakest[None])
        found: list[Choice] = []
        for counts in self._all_counts(stages, layers):
            fitting = self._as_choices(counts[self._fit(ranks, stages, counts)])
            found = _unbeaten([*found, *fitting])
        return found

    def _all_counts(self, stages: tuple[int, ...], layers: Longs) -> Iterator[Longs]:
        """Yield every assignment of levels to the layers of a component's stages, many at once, [n, stages, K, 3]."""
        allowed = np.flatnonzero(self.costs.levels).tolist()
        cells = [(place, run) for place, stage in enumerate(stages) for run in np.flatnonzero(layers[stage]).tolist()]
        options = []
        for place, run in cells:
            if self._levels_alike(run):
                options.append(np.array([_only(int(layers[stages[place], run]), allowed[0])]))
            else:
                options.append(np.array(_splits(int(layers[stages[place], run]), allowed)))
        number = prod(len(option) for option in options)
        self._num_levels += number
        if self._num_levels > MOST_LEVELS:
            raise _TooMany
        for first in range(0, number, _CHUNK):
            index = np.arange(first, min(first + _CHUNK, number))
            counts = np.zeros((len(index), len(stages), layers.shape[1], 3), dtype=np.int64)
            for (place, run), option in zip(reversed(cells), reversed(options), strict=True):
                index, chosen = np.divmod(index, len(option))
                counts[:, place, run] = option[chosen]
            yield counts

    def _levels_alike(self, run: int) -> bool:
        runs = self.costs.runs
        rows = (runs.recompute_s, runs.kept_bytes, runs.late_bytes, runs.workspace_bytes)
        return all((row[:, run] == row[0, run]).all() for row in rows)

    def _as_choices(self, counts: Longs) -> list[Choice]:
        seconds = np.einsum("nskl,lk->ns", counts, self.costs.runs.recompute_s)
        return [Choice(*pair) for pair in zip(counts, seconds, strict=True)]

    def _fit(self, ranks: tuple[int, ...], stages: tuple[int, ...], counts: Longs) -> npt.NDArray[np.bool_]:
        """Return which assignments [n, stages, K, 3] fit all ranks of a component, [n]."""
        if ranks not in self._slots:
            self._slots[ranks] = self.costs.slots.part(ranks, stages)
        peaks = self.costs.peak_bytes(counts, self._slots[ranks])
        return np.asarray((peaks <= self.costs.capacity_bytes * (1 + 1e-12)).all(axis=1))


def _unbeaten(choices: list[Choice]) -> list[Choice]:
    """Return the choices that no other one beats on every stage; of equal ones the first."""
    kept: list[int] = []
    seconds = np.array([choice.seconds for choice in choices])
    for index in np.argsort(seconds.sum(axis=1), kind="stable").tolist() if choices else []:
        if not (seconds[kept] <= seconds[index]).all(axis=1).any():
            kept.append(index)
    return [choices[index] for index in sorted(kept)]


def _at_level(layers: Longs, level: int) -> Longs:
    """Return counts of layers [..., S, K] that are all at a level."""
    counts = np.zeros((*layers.shape, 3), dtype=np.int64)
    counts[..., level] = layers
    return counts


def _only(number: int, level: int) -> tuple[int, int, int]:
    counts = [0, 0, 0]
    counts[level] = number
    return counts[0], counts[1], counts[2]


def _splits(number: int, allowed: list[int]) -> list[tuple[int, int, int]]:
    """Return every way to give `number` equal layers the allowed levels."""
    found = []
    for first in range(number + 1):
        for second in range(number + 1 - first):
            split = (number - first - second, first, second)
            if all(count == 0 or level in allowed for level, count in enumerate(split)):
                found.append(split)
    return found
