"""Which configurations another one undercuts in all that any completion costs and keeps, under every family.

Rows of equal ranks and microbatches are compared in what a layer of each class costs and keeps, and in the links between
ranks. Families send messages between neighbours on the ring of ranks only, and two replicas of a stage meet on ranks 0
and D - 1 as far from each other as anywhere; tied layers may stand on any two ranks. Links are compared level by level:
which level joins two ranks depends on how the devices are numbered alone, and pairs that all rows join alike are one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.dominance import leaders_of
from stagewright.planner.search.pipeline_costs import line_between, pair_sum_s
from stagewright.planner.search.pricing import (
    AXES,
    CP,
    DP,
    NUM_MICROBATCHES,
    PP,
    SP,
    TP,
    UNIT,
    VOCAB,
    Priced,
    configuration_of,
    unique_rows,
)
from stagewright.planner.search.problem import Problem

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(eq=False)
class RowLeaders:
    """The leading row of each configuration, among those that were asked for together."""

    problem: Problem
    priced: Priced
    _leading: Longs = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _levels: dict[tuple[int, ...], Ints] = field(default_factory=dict)
    _known_lines: dict[tuple[float, ...], Floats] = field(default_factory=dict)
    _known_sums: dict[tuple[int, ...], list[list[float]]] = field(default_factory=dict)

    def of(self, rows: Longs) -> Longs:
        """Return the leading row of each of some different rows; those asked for before keep their leaders."""
        if not len(rows) or (len(self._leading) and (self._leading[rows] >= 0).all()):
            return self._leading[rows]
        self._leading = np.full(len(self.priced), -1)
        _, group = unique_rows(self.priced.shape[rows][:, [PP, NUM_MICROBATCHES]])
        by_group = np.argsort(group, kind="stable")
        for places in np.split(by_group, np.flatnonzero(np.diff(group[by_group])) + 1):
            members = rows[places]
            leaders = leaders_of(self._features(members)) if len(members) > 1 else np.zeros(1, dtype=np.int64)
            self._leading[members] = members[leaders]
        return self._leading[rows]

    def _features(self, rows: Longs) -> Floats:
        """Return all that completions on rows of equal ranks and microbatches cost and keep, [n, F]."""
        priced = self.priced
        names = [name for name in Priced.__dataclass_fields__ if name != "shape"]
        flat = [getattr(priced, name)[rows].reshape(len(rows), -1) for name in names]
        return np.concatenate([*flat, self._links(rows)], axis=1)

    def _links(self, rows: Longs) -> Floats:
        """Return lines between neighbouring ranks, the line of a sum over the first and last, and sums of tied layers."""
        shape = self.priced.shape[rows]
        ranks = int(shape[0, PP])
        if ranks == 1:
            return np.zeros((len(rows), 0))
        grids, grid_of = unique_rows(np.stack([shape[:, TP] * shape[:, CP], *shape[:, [AXES, DP, PP]].T], axis=1))
        first = np.unique(grid_of, return_index=True)[1]
        levels = np.stack([self._joining(tuple(key), shape[at]) for key, at in zip(grids.tolist(), first, strict=True)])
        around, any_two = levels[:, :ranks], levels[:, ranks:]
        each = np.arange(len(rows))[:, None]
        lines = self._lines(rows)[each, _distinct(around)[grid_of]]
        found = [lines.reshape(len(rows), -1), self._sum_lines[around[grid_of, ranks - 1]]]
        if any_two.shape[1]:
            sums, pairs = self._tie_sums(shape), _distinct(any_two)[grid_of]
            found += [sums[each, place, pairs] for place in range(sums.shape[1])]
        return np.concatenate(found, axis=1)

    def _joining(self, key: tuple[int, ...], shape: Ints) -> Ints:
        """Return the level that joins each rank and the next one round the ring; where layers are tied, any two ranks behind."""
        if key not in self._levels:
            wiring, here = self.problem.wiring_for(configuration_of(shape), 0.0), np.arange(key[-1])
            found = [wiring.levels(here, (here + 1) % len(here))]
            if self.problem.profile.trained_ties:
                any_two = wiring.levels(here[:, None], here[None, :])
                any_two[here, here] = len(self.problem.cluster.groups[0].links)  # the rank itself
                found.append(any_two.ravel())
            self._levels[key] = np.concatenate(found).astype(np.int32)
        return self._levels[key]

    @cached_property
    def _sum_lines(self) -> Floats:
        """Latency and seconds for UNIT bytes of a sum over two ranks that a level joins, [levels, 2]."""
        links = self.problem.cluster.groups[0].links
        latency = np.array([2.0 * pair_sum_s(link, UNIT) - pair_sum_s(link, 2.0 * UNIT) for link in links])
        whole = np.array([pair_sum_s(link, UNIT) for link in links])
        return np.stack([np.maximum(latency, 0.0), whole - latency], axis=1)

    def _lines(self, rows: Longs) -> Floats:
        """Return latency and seconds a byte of messages of each row over each level, [n, levels, 2]."""
        shape, links = self.priced.shape[rows], self.problem.cluster.groups[0].links
        largest_bytes = self.priced.cut_bytes[rows].max(axis=1)
        found = np.empty((len(rows), len(links), 2))
        known = self._known_lines
        for place, key in enumerate(zip(*shape[:, [TP, SP, AXES]].T.tolist(), largest_bytes.tolist(), strict=True)):
            if key not in known:
                configuration = configuration_of(shape[place])
                model = self.problem.model(configuration.axis_order)
                inside = model.scattering_group(configuration.degrees, num_pipeline_ranks=configuration.num_ranks)
                lines = [line_between(link, inside, key[-1]) for link in links]
                known[key] = np.array([(line.latency_s, 1.0 / line.bytes_per_s) for line in lines])
            found[place] = known[key]
        return found

    def _tie_sums(self, shape: Ints) -> Floats:
        """Return the seconds of summing each pair of tied layers over each level and within a rank, [n, ties, levels + 1]."""
        links, known = self.problem.cluster.groups[0].links, self._known_sums
        keys, where = unique_rows(shape[:, [TP, VOCAB]])
        for key, place in zip(map(tuple, keys.tolist()), np.unique(where, return_index=True)[1], strict=True):
            if key not in known:
                ties = self.problem.ties(configuration_of(shape[place]))
                known[key] = [[*(pair_sum_s(link, tie.gradient_bytes) for link in links), 0.0] for tie in ties]
        sums = [known[key] for key in map(tuple, keys.tolist())]
        return np.array(sums).reshape(len(keys), -1, len(links) + 1)[where]


def _distinct(levels: Ints) -> Ints:
    """Return the different columns."""
    return unique_rows(levels.T)[0].T
