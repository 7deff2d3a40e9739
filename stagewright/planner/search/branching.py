"""Branch and cut over one candidate: layers, levels and workspaces made whole by branching, paths added where they are missed.

    node      limits on what is whole (`cut_program.Wholes`) beside those of the program
    solve     the linear program; a node whose optimum is at the target or above is closed
    cut       simulate at the optimum and near the best point, add their critical paths, until the bound hardly rises
    probe     solve a few dual steps with a number rounded down and rounded up; where one of the two is closed, the
              other holds, and where both are, the node is closed; the next kind waits for what this one decides
    branch    on the number whose two sides rise most (the largest product of rises: strong branching)

First come positions of the small classes (is the head on the last stage or on the one before?), then layers of ranks, workspaces
and raised layers of ranks: there fractions hide most, and where ranks are nearly full, probing decides many at once.

A whole optimum is a completion: it is simulated, and its path is one more row. Where that does not move the optimum (hops
and small workspaces are least in the program), its numbers are fixed one after the other, until the completion alone is
left, whose step is known. So the search is exact but for its limit on nodes; what is left open keeps its bound, and is where the
candidate's next branching begins.

How nodes were split (`Split`) is kept for the other candidates of the order, whose costs differ little: they go down the
same tree without probing, check each side that probing closed, and search on where a leaf stays open.

Complexity: a node is tens of linear programs with a warm basis. Paper: Achterberg, Koch, Martin, Branching rules revisited
(Operations Research Letters 33, 2005).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.cut_program import (
    CELLS,
    ENDS,
    RAISED,
    RAISED_ON_RANKS,
    STAGES,
    CutProgram,
    Point,
)
from stagewright.planner.search.incumbent import Completion
from stagewright.planner.search.path_rows import Rules

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

FIRST_ROUNDS, ROUNDS, KNOWN_ROUNDS = 100, 16, 3  # at the root, at a node, at one whose parts are known
_SMOOTHING = 0.93
_PROBED = 2  # numbers of each kind that are probed; at the root all up to RAISED_ON_RANKS
_STEPS = 40
_WHOLE = 1e-6
_TOLERANCE = 1e-7
_LITTLE = 1e-4  # of the target, that one round has to raise a bound for another

Limit = tuple[int, float, float]


@dataclass(eq=False)
class Split:
    """How a node was split: limits of each part, beside the node's own, which together miss no completion; none for a leaf."""

    parts: list[tuple[tuple[Limit, ...], Split]] = field(default_factory=list)

    def into(self, *parts: tuple[Limit, ...]) -> None:
        """Split a leaf."""
        self.parts = [(limits, Split()) for limits in parts]

    def __reduce__(
        self,
    ) -> tuple[Callable[[list[list[tuple[Limit, ...]]]], Split], tuple[list[list[tuple[Limit, ...]]]]]:
        """Travel as a list, however deep the tree is: the limits of each node's parts, a node's parts behind all before them."""
        nodes, listed = [self], []
        for node in nodes:
            listed.append([limits for limits, _ in node.parts])
            nodes += [split for _, split in node.parts]
        return _from_list, (listed,)


def _from_list(listed: list[list[tuple[Limit, ...]]]) -> Split:
    nodes = [Split()]
    for place, parts in enumerate(listed):
        nodes[place].into(*parts)
        nodes += [split for _, split in nodes[place].parts]
    return nodes[0]


class Left(NamedTuple):
    """What a branching left open: a bound of its completions, and the way to it through the tree, part by part."""

    bound_s: float
    way: tuple[int, ...]


WHOLE = (Left(-np.inf, ()),)


@dataclass(frozen=True, eq=False)
class _Node:
    bound_s: float
    limits: tuple[Limit, ...]
    split: Split
    way: tuple[int, ...]

    def parts(self, bound_s: float) -> list[_Node]:
        """Return what the node was split into, under its bound."""
        return [
            _Node(bound_s, self.limits + limits, split, (*self.way, part))
            for part, (limits, split) in enumerate(self.split.parts)
        ]


@dataclass(eq=False)
class Branching:
    """The search of one candidate for a completion below the target.

    Parameters
    ----------
    target_s : completions of at least this long are of no interest.
    gap : a completion found lowers the target to its step over 1 + gap.
    complete : a completion for a point and whether it is whole: as it is, or one near it; judged.
    is_late : whether a deadline has passed.
    tree : how candidates of the same order were split; grows.
    left : what is open: all, or what an earlier branching of the candidate left.
    """

    program: CutProgram
    target_s: float
    gap: float
    complete: Callable[[Point, bool], Completion | None]
    is_late: Callable[[], bool]
    tree: Split = field(default_factory=Split)
    left: Sequence[Left] = WHOLE
    best: Completion | None = None
    num_nodes: int = 0
    carrying: dict[int, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._wholes = self.program.wholes
        self._held = self._wholes.low, self._wholes.high  # limits that the program has
        self.program.stop_at(self.target_s)

    def run(self, most_nodes: int) -> float:
        """Return the bound that is proved, the target where every node is closed.

        From the open node of least bound, and down to its last part next, whose basis is near its own: all parts of a node come
        before the next node.
        """
        open_nodes = sorted(map(self._node, self.left), key=lambda node: -node.bound_s)
        while open_nodes and self.num_nodes < most_nodes and not self.is_late():
            node = open_nodes.pop()
            if node.bound_s < self.target_s:
                open_nodes += self._children(node)
        self.left = [Left(node.bound_s, node.way) for node in open_nodes if node.bound_s < self.target_s]
        return min([self.target_s, *(left.bound_s for left in self.left)])

    def _node(self, left: Left) -> _Node:
        """Return the node that was left open."""
        limits: tuple[Limit, ...] = ()
        split = self.tree
        for part in left.way:
            more, split = split.parts[part]
            limits += more
        return _Node(left.bound_s, limits, split, left.way)

    def _children(self, node: _Node) -> list[_Node]:
        """Return what is left of a node: nothing where it is closed; the last one is taken next."""
        rounds = FIRST_ROUNDS
        if node.limits:
            rounds = KNOWN_ROUNDS if node.split.parts else ROUNDS
        point = self._solved(rounds) if self._hold(node.limits) else None
        if point is None:
            return []
        bound_s = max(node.bound_s, point.bound_s * (1 - _TOLERANCE))
        if node.split.parts:
            self._note_carrying()
            return node.parts(bound_s)
        self.num_nodes += 1
        values = self.program.values_of(self._wholes)
        away = np.abs(values - np.round(values))
        if not (away > _WHOLE).any():
            return self._completed(node, bound_s, point, np.round(values))
        self._offer(self.complete(point, False))
        self._note_carrying()
        chosen, fixed = self._probed(values, away, bound_s, is_root=not node.limits)
        if fixed:
            node.split.into(fixed, *((_denied(limit),) for limit in fixed))
            return node.parts(bound_s)[:1]
        floor = float(np.floor(values[chosen]))
        sides = [((chosen, -np.inf, floor),), ((chosen, floor + 1.0, np.inf),)]
        if values[chosen] - floor <= 0.5:
            sides.reverse()
        node.split.into(*sides)
        return [] if fixed is None else node.parts(bound_s)

    def _solved(self, rounds: int) -> Point | None:
        """Return the optimum after some rounds of cuts; None where the node is closed."""
        bound_s = self.program.improve(Rules(rounds, _SMOOTHING, stops_below=False, near=0.0, little=_LITTLE))
        return None if bound_s * (1 - _TOLERANCE) >= self.target_s else self.program.point(bound_s)

    def _completed(self, node: _Node, bound_s: float, point: Point, values: Floats) -> list[_Node]:
        """Return what is left of a node whose optimum is whole."""
        found = self.complete(point, True)
        self._offer(found)
        if found is not None and self.program.misses(found.cut):
            return [replace(node, bound_s=bound_s)]
        is_column = self._wholes.variable < self.program.num_columns
        layers = np.isin(self._wholes.kind, (ENDS, STAGES, CELLS, RAISED)) & is_column
        open_places = np.flatnonzero(layers & (self._low < self._high))
        if not len(open_places):
            return []
        first = int(open_places[np.argmin(self._wholes.kind[open_places])])
        value = float(values[first])
        sides = ((-np.inf, value - 1.0), (value + 1.0, np.inf), (value, value))
        node.split.into(*(((first, *side),) for side in sides))
        return node.parts(bound_s)

    def _probed(
        self, values: Floats, away: Floats, bound_s: float, *, is_root: bool
    ) -> tuple[int, tuple[Limit, ...] | None]:
        """Return the number to branch on, and the limits that probing proves; None for these where the node is closed."""
        kinds = self._wholes.kind
        best, chosen = -1.0, -1
        fixed: list[Limit] = []
        for kind in np.unique(kinds[away > _WHOLE]).tolist():
            places = np.flatnonzero((away > _WHOLE) & (kinds == kind))
            places = places[np.argsort(-away[places], kind="stable")]
            for place in (places if is_root and kind <= RAISED_ON_RANKS else places[:_PROBED]).tolist():
                floor = float(np.floor(values[place]))
                low, high = self._low[place], self._high[place]
                sides = ((low, floor), (floor + 1.0, high))
                raised_s = self.program.probe(int(self._wholes.variable[place]), sides, _STEPS)
                closed = [bool(side_s >= self.target_s) for side_s in raised_s]
                if all(closed):
                    return place, None
                if closed[0]:
                    fixed.append((place, floor + 1.0, np.inf))
                elif closed[1]:
                    fixed.append((place, -np.inf, floor))
                rises = [max(min(side_s, 1.02 * self.target_s) - bound_s, 1e-6 * self.target_s) for side_s in raised_s]
                if rises[0] * rises[1] > best:
                    best, chosen = rises[0] * rises[1], place
            if fixed or self.is_late():
                break
        return chosen, tuple(fixed)

    def _offer(self, found: Completion | None) -> None:
        """Note a completion; the target falls where it is the best one."""
        if found is not None and (self.best is None or found.step_s < self.best.step_s):
            self.best = found
            lowered_s = found.step_s / (1.0 + self.gap)
            if lowered_s < self.target_s:
                self.target_s = lowered_s
                self.program.stop_at(lowered_s)

    def _note_carrying(self) -> None:
        self.carrying |= dict.fromkeys(self.program.carrying().tolist())

    def _hold(self, limits: tuple[Limit, ...]) -> bool:
        """Set the program's limits to those of a node; False where they leave nothing."""
        self._low, self._high = self._wholes.low.copy(), self._wholes.high.copy()
        for place, low, high in limits:
            self._low[place], self._high[place] = max(self._low[place], low), min(self._high[place], high)
        if (self._low > self._high).any():
            return False
        changed = np.flatnonzero((self._low != self._held[0]) | (self._high != self._held[1]))
        self.program.limit(self._wholes.variable[changed], self._low[changed], self._high[changed])
        self._held = self._low, self._high
        return True


def _denied(limit: Limit) -> Limit:
    """Return the limit that a one-sided limit denies."""
    place, low, high = limit
    return (place, high + 1.0, np.inf) if np.isinf(low) else (place, -np.inf, low - 1.0)
