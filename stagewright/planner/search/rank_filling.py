"""How far one pipeline rank after the other gets with layers within a step and its memory: arithmetic for checks of bounds.

With T microbatches, t_l seconds of layer l a microbatch (forward and both gradients), r_l those of recomputation by level, u_l seconds
at the step's end, c and d what no layer changes, f_l and w_l the least seconds of a forward and of t_l + r_l before a microbatch comes,
a rank with layers [j, i) needs

    sum_{l < j} f_l + sum_{j <= l < i} (T t_l + min T r_l + u_l) + c      before its own end
    sum_{l < j} w_l + sum_{j <= l < i} (T t_l + min T r_l) + d            before the first rank's, where backwards are whole: the
                                                                          last gradient still has to go up

and bytes s_l of states and k_l, by level, of the microbatches that it holds at once at least. Of both together, at any price m in
seconds a byte (`byte_prices`),

    sum_{l < j} f_l + sum_{j <= l < i} (T t_l + u_l + m s_l + min over levels of T r_l + m k_l) + c - m room

So the first i that a step of X seconds cannot reach from j follows. A layer that a rank leaves to the ranks above it shortens it by
T w_l at least and delays it by w_l at most: what is reached grows with j, and where the last rank does not reach the last layer
with every rank at its most, no partition takes X seconds or less.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.pricing import Priced
from stagewright.planner.search.problem import Problem

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Heads = tuple[Floats, Floats]  # forwards, and whole passes, of the layers before each layer: [L + 1] or [n, L + 1]

_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class RankCosts:
    """What a rank needs of each choice: `needs` are seconds of the layers before each layer [n, L + 1], of no layer [n], and of
    those before the rank's first one; `held_bytes` [n, L + 1] of the layers before each layer."""

    needs: tuple[tuple[Floats, Floats, Floats], ...]
    held_bytes: Floats
    room_bytes: float

    @classmethod
    def of(
        cls,
        problem: Problem,
        priced: Priced,
        *,
        num_microbatches: int | Longs,
        live: float | Floats,
        room_bytes: float,
        heads: Heads,
        split: bool,
    ) -> RankCosts:
        """Return the costs of priced choices; microbatches, and those that live at once at least, of all or of each, [n]."""
        profile, classes, levels = problem.profile, problem.classes, list(problem.levels)
        count = np.broadcast_to(np.asarray(num_microbatches, dtype=np.float64), len(priced))
        kept = np.broadcast_to(live, len(priced))[:, None, None] * priced.kept_bytes[:, levels]
        again_s = count[:, None, None] * priced.recompute_s[:, levels]
        work_s = count[:, None] * (priced.forward_s + priced.input_grad_s + priced.weight_grad_s)
        always_s = profile.step_overhead_s + 2.0 * count * profile.action_overhead_s
        room_bytes *= 1.0 + _ROUNDING
        forwards_s, wholes_s = heads
        needs = []
        for price in [np.zeros(len(priced)), *byte_prices(again_s, kept, int(np.argmax(classes.counts)))]:
            each = work_s + priced.step_s + price[:, None] * priced.state_bytes
            each += (again_s + price[:, None, None] * kept).min(axis=1)
            constant_s = always_s + priced.latency_s - price * room_bytes
            needs.append((before(each[:, classes.of_layer]), constant_s, forwards_s))
        if not split:
            needs.append((before((work_s + again_s.min(axis=1))[:, classes.of_layer]), always_s, wholes_s))
        least_bytes = priced.state_bytes + kept.min(axis=1)
        return cls(tuple(needs), before(least_bytes[:, classes.of_layer]), room_bytes)

    def reach(self, most_s: float) -> Longs:
        """Return the layer that a rank reaches from each layer within some seconds, int64 [n, L + 1]."""
        reach = _last_at_most(self.held_bytes, self.held_bytes + self.room_bytes)
        for done_s, constant_s, head_s in self.needs:
            until_s = done_s + (most_s - constant_s)[:, None] - head_s
            reach = np.minimum(reach, _last_at_most(done_s, until_s))
        return np.maximum(reach, np.arange(reach.shape[1]))

    def hold_all(self, most_s: float, num_ranks: int) -> npt.NDArray[np.bool_]:
        """Tell which choices so many ranks could hold all layers of, in any order, [n]."""
        holds = [done_s[:, -1] <= num_ranks * (most_s - constant_s) for done_s, constant_s, _ in self.needs]
        return np.asarray(np.all(holds, axis=0) & (self.held_bytes[:, -1] <= num_ranks * self.room_bytes))


def byte_prices(again_s: Floats, kept_bytes: Floats, kind: int) -> list[Floats]:
    """Return prices of a byte in seconds, by choice [n], at which two levels of layers of a class cost the same.

    From seconds of recomputation and kept bytes, [n, levels, C] each; at such a price both limits together say most.
    """
    prices = []
    for low, high in combinations(range(again_s.shape[1]), 2):
        more_s = again_s[:, high, kind] - again_s[:, low, kind]
        less_bytes = kept_bytes[:, low, kind] - kept_bytes[:, high, kind]
        is_trade = (more_s > 0) & (less_bytes > 0)
        prices.append(np.divide(more_s, less_bytes, out=np.zeros_like(more_s), where=is_trade))
    return prices


def before(each: Floats) -> Floats:
    """Return the sums of what stands before each place, [n, L + 1] of [n, L]."""
    return np.concatenate((np.zeros((len(each), 1)), np.cumsum(each, axis=1)), axis=1)


def _last_at_most(rising: Floats, most: Floats) -> Longs:
    """Return the last place of each row of `rising` [n, P] that is at most each of `most` [n, Q], int64 [n, Q]; -1 for none."""
    return np.asarray((rising[:, None, :] <= most[:, :, None]).sum(axis=2, dtype=np.int64) - 1)
