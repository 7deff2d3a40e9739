"""Bounds of single stages over every range of layers, and paths through them: the numbers of a search by stages.

Stage s of S holds a range [i, j) of layers on its own choice of degrees and device, with F, I, W, step and states as
prefix sums. `range_bounds` gives for every stage and range a lower bound on the step of any plan that has it,

    P_s = T t_s + head(i) + up          Q_s = T t_s + headF(i) + tail_s      C_s = (T - S + 1 + s) t_s + head(i) + 2 rest(j)

as in `interval_dp` (P for fused backwards, Q for any, C for 1F1B with T > S), where head and rest take each layer's least
seconds over the choices before and behind (`sums_around` raises both). t_s holds a lower bound of the recomputation that memory forces, the highest
over a few prices x of a byte: x times the bytes short, less what layers gain by saving at that price (`choice_tables`).
Infinite where a range never fits.

`least_path` minimises the maximum of the bounds over all cuts into stages; `weighted_path` minimises

    sum over stages of  a_s F + b_s I + c_s W + d_s tail + e_s hop

over the ranges whose bound is below a target. With weights from a convex combination of critical paths of the order that
is the Lagrangian bound: no partition simulates below both target and value. O(S L^2) each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

NUM_PRICES = 3
UNIFORM, GPIPE, FUSED, SPLIT, SERIAL, GRAPH = range(6)
KIND_OF = {"uniform": UNIFORM, "gpipe": GPIPE, "fused": FUSED, "split": SPLIT, "serial": SERIAL, "graph": GRAPH}


@dataclass(frozen=True, eq=False)
class StageTables:
    """What stages cost, by stage, in the order in which `range_bounds` takes it; prefix sums have shape [S, L + 1].

    Parameters
    ----------
    forward, input_grad, weight_grad, state, step : prefix sums of one layer's seconds and bytes.
    kept, late : prefix sums of the bytes of a microbatch at the allowed level that keeps least, before and after I.
    full_kept, full_late : the same at the allowed level of least recomputation.
    workspace : [S, L], least workspace of a layer over the levels.
    price : [S, NUM_PRICES], seconds for a byte of one microbatch.
    gain : [S, NUM_PRICES, L + 1], prefix sums of what a layer's level saves at that price less its seconds, at most.
    latency : [S], once a step.
    live, late_live : [S], microbatches before and after their input gradient at the peak.
    room : [S], bytes of a device.
    head, head_forward, rest : [S, L + 1], least seconds of the layers before a start and from an end on.
    """

    forward: Floats
    input_grad: Floats
    weight_grad: Floats
    state: Floats
    step: Floats
    kept: Floats
    late: Floats
    full_kept: Floats
    full_late: Floats
    workspace: Floats
    price: Floats
    gain: Floats
    latency: Floats
    live: Floats
    late_live: Floats
    room: Floats
    head: Floats
    head_forward: Floats
    rest: Floats

    @property
    def num_stages(self) -> int:
        return len(self.latency)

    def bounds(
        self, num_microbatches: int, kind: int, overhead_s: float, windows: Longs, *, below_s: float = np.inf
    ) -> tuple[Floats, Floats]:
        """Return the bound and the recomputation of every range, [S, L + 1, L + 1]; infinite outside the windows.

        `windows` [S + 1, 2] holds the least and the largest first layer of each stage, and of the end.
        """
        found: tuple[Floats, Floats] = range_bounds(
            *(getattr(self, field.name) for field in fields(self)),
            num_microbatches,
            kind,
            overhead_s,
            windows,
            below_s,
        )
        return found

    def raised(
        self,
        bound: Floats,
        recompute: Floats,
        num_microbatches: int,
        kind: int,
        overhead_s: float,
        windows: Longs,
        *,
        below_s: float,
    ) -> tuple[Floats, Floats]:
        """Return bounds that see which ranges are left before and behind a stage; as `bounds` for a graph of stages.

        Parameters
        ----------
        bound, recompute : what `bounds` returned for the same arguments.
        """
        if kind == GRAPH:
            return bound, recompute
        time = self.forward + self.input_grad + self.weight_grad
        head, head_forward, rest = sums_around(bound, recompute, self.forward, time)
        around = replace(self, head=head, head_forward=head_forward, rest=rest)
        return around.bounds(num_microbatches, kind, overhead_s, windows, below_s=below_s)


@njit(cache=True)
def range_bounds(
    forward: Floats,
    input_grad: Floats,
    weight_grad: Floats,
    state: Floats,
    step: Floats,
    kept: Floats,
    late: Floats,
    full_kept: Floats,
    full_late: Floats,
    workspace: Floats,
    price: Floats,
    gain: Floats,
    latency: Floats,
    live: Floats,
    late_live: Floats,
    room: Floats,
    head: Floats,
    head_forward: Floats,
    rest: Floats,
    num_microbatches: int,
    kind: int,
    overhead_s: float,
    windows: Longs,
    below_s: float,
) -> tuple[Floats, Floats]:
    """Return (bound, recomputation seconds), [S, L + 1, L + 1]; see `StageTables.bounds`."""
    num_stages, places = forward.shape
    bound = np.full((num_stages, places, places), np.inf)
    recompute = np.zeros((num_stages, places, places))
    split = kind == 3
    pair = (3.0 if split else 2.0) * overhead_s
    for s in range(num_stages):
        for i in range(windows[s, 0], windows[s, 1] + 1):
            space = 0.0
            for j in range(i + 1, windows[s + 1, 1] + 1):
                space = max(space, workspace[s, j - 1])
                if j < windows[s + 1, 0]:
                    continue
                fixed = state[s, j] - state[s, i] + space
                least = live[s] * (kept[s, j] - kept[s, i]) + late_live[s] * (late[s, j] - late[s, i])
                if fixed + least > room[s]:
                    break
                most = live[s] * (full_kept[s, j] - full_kept[s, i]) + late_live[s] * (
                    full_late[s, j] - full_late[s, i]
                )
                extra = 0.0
                short = fixed + most - room[s]
                if short > 0.0:
                    short /= live[s] + late_live[s]
                    for k in range(price.shape[1]):
                        extra = max(extra, price[s, k] * short - (gain[s, k, j] - gain[s, k, i]))
                own = (
                    forward[s, j]
                    - forward[s, i]
                    + input_grad[s, j]
                    - input_grad[s, i]
                    + weight_grad[s, j]
                    - weight_grad[s, i]
                    + extra
                    + pair
                )
                tail = step[s, j] - step[s, i] + latency[s]
                value = (
                    num_microbatches * own + head_forward[s, i] + s * overhead_s * (0.0 if kind == 5 else 1.0) + tail
                )
                if kind == 5:
                    value = num_microbatches * own + tail
                elif kind == 4:
                    value = num_microbatches * (own + head[s, i] + rest[s, j] + (num_stages - 1) * pair) + tail
                elif not split:
                    value = max(value, num_microbatches * own + head[s, i] + s * pair)
                    if kind == 0 and num_microbatches > num_stages:
                        rounds = num_microbatches - num_stages + 1 + s
                        behind = rest[s, j] + (num_stages - 1 - s) * pair
                        value = max(value, head[s, i] + s * pair + rounds * own + 2.0 * behind)
                if value < below_s:
                    bound[s, i, j] = value
                    recompute[s, i, j] = extra
                elif j > i + 1 and value >= below_s and kind != 0 and kind != 4:
                    break
    return bound, recompute


@njit(cache=True)
def sums_around(bound: Floats, recompute: Floats, forward: Floats, time: Floats) -> tuple[Floats, Floats, Floats]:
    """Return (head, head_forward, rest), [S, L + 1], with the stages around one on ranges of finite bound alone.

    A partition below the target has no other ranges, so the stages before one that starts at i take at least head(i), and
    those behind one that ends at j at least rest(j): shortest paths, where `StageTables` counts every layer at its least.
    """
    num_stages, places, _ = bound.shape
    head = np.full((num_stages, places), np.inf)
    ahead = np.full((num_stages, places), np.inf)
    rest = np.full((num_stages, places), np.inf)
    head[0, 0] = ahead[0, 0] = 0.0
    for s in range(num_stages - 1):
        for i in range(places - 1):
            if head[s, i] == np.inf:
                continue
            for j in range(i + 1, places):
                if bound[s, i, j] < np.inf:
                    own = head[s, i] + time[s, j] - time[s, i] + recompute[s, i, j]
                    head[s + 1, j] = min(head[s + 1, j], own)
                    ahead[s + 1, j] = min(ahead[s + 1, j], ahead[s, i] + forward[s, j] - forward[s, i])
    rest[num_stages - 1, places - 1] = 0.0
    for s in range(num_stages - 1, 0, -1):
        for i in range(places - 1):
            for j in range(i + 1, places):
                if bound[s, i, j] < np.inf and rest[s, j] < np.inf:
                    own = rest[s, j] + time[s, j] - time[s, i] + recompute[s, i, j]
                    rest[s - 1, i] = min(rest[s - 1, i], own)
    return head, ahead, rest


@njit(cache=True)
def least_path(bound: Floats) -> tuple[float, Longs]:
    """Return the least maximum over stages of the bounds of their ranges, and its cuts [S + 1]."""
    num_stages, places, _ = bound.shape
    value = np.full((num_stages + 1, places), np.inf)
    choice = np.zeros((num_stages + 1, places), dtype=np.int64)
    value[num_stages, places - 1] = 0.0
    for s in range(num_stages - 1, -1, -1):
        for i in range(places - 1):
            for j in range(i + 1, places):
                here = max(bound[s, i, j], value[s + 1, j])
                if here < value[s, i]:
                    value[s, i] = here
                    choice[s, i] = j
    cuts = np.zeros(num_stages + 1, dtype=np.int64)
    for s in range(num_stages):
        cuts[s + 1] = choice[s, cuts[s]]
    return value[0, 0], cuts


@njit(cache=True)
def weighted_path(
    bound: Floats,
    recompute: Floats,
    forward: Floats,
    input_grad: Floats,
    weight_grad: Floats,
    step: Floats,
    latency: Floats,
    weights: Floats,
    hop_s: Floats,
    tail_weight: Floats,
    overhead_s: float,
    split: bool,
) -> tuple[float, Longs]:
    """Return the least weighted sum over the ranges of finite bound, and its cuts [S + 1]; infinite when there is none.

    `weights` [3, S] counts F, I and W of each stage, `tail_weight` [S] its tail; `hop_s` [S, L + 1] is what the counted
    messages into it take when it starts at a layer.
    """
    num_stages, places, _ = bound.shape
    value = np.full((num_stages + 1, places), np.inf)
    choice = np.zeros((num_stages + 1, places), dtype=np.int64)
    value[num_stages, places - 1] = 0.0
    for s in range(num_stages - 1, -1, -1):
        fixed = overhead_s * (weights[0, s] + weights[1, s] + (weights[2, s] if split else 0.0))
        fixed += tail_weight[s] * latency[s]
        for i in range(places - 1):
            if value[s + 1, i + 1 :].min() == np.inf:
                continue
            start = fixed + hop_s[s, i]
            start -= (
                weights[0, s] * forward[s, i] + weights[1, s] * input_grad[s, i] + weights[2, s] * weight_grad[s, i]
            )
            start -= tail_weight[s] * step[s, i]
            for j in range(i + 1, places):
                if bound[s, i, j] == np.inf or value[s + 1, j] == np.inf:
                    continue
                here = start + weights[0, s] * forward[s, j] + weights[1, s] * (input_grad[s, j] + recompute[s, i, j])
                here += weights[2, s] * weight_grad[s, j] + tail_weight[s] * step[s, j] + value[s + 1, j]
                if here < value[s, i]:
                    value[s, i] = here
                    choice[s, i] = j
    cuts = np.zeros(num_stages + 1, dtype=np.int64)
    if value[0, 0] < np.inf:
        for s in range(num_stages):
            cuts[s + 1] = choice[s, cuts[s]]
    return value[0, 0], cuts
