"""Step seconds and peak bytes of one full configuration in closed form: degrees, ZeRO, recomputation, schedule family.

Blocks are dealt out evenly over D pipeline ranks (v chunks each); what stands before them goes to the first rank, what
stands behind to the last. With F, I, W a rank's forward, input and weight gradient of one microbatch (I with
recomputation), t = F + I + W, c one hop, T microbatches and ranks 0 (first), m (any inner one), l (last):

    gpipe         sum t + (T-1)(max F + max (I+W)) + 2 (D-1) c                        Huang et al. 2019, exact
    1f1b          the largest of three kinds of paths, for r in {0, m, l}:
                  sum_{s<r} t + T t_r + 2 r c;   sum_{s<r} t + (T-D+1+r) t_r + 2 sum_{s>r} t + (2r + 4(D-1-r)) c  (T > D);
                  T (mean t + 2 c (D-1)/D), a microbatch going round
    interleaved   T max t + (sum t - max t)/v + 2 (D v - 1) c                         Narayanan et al. 2021
    zb-h1         T max t + (D-1) max(0, F + I - W) + 2 (D-1) c                       Qi et al. 2023
    zb-h2         T max t + (D-1) max(0, F + I - 2 W) + 2 (D-1) c
    zb-v          T max t + (D-1) |F + I - 2 W| / 2 + 2 (D-1) c

plus gradient reduction and optimizer of the rank that ends last. Microbatches alive on the first rank: T for gpipe,
min(T, D), min(T, D + (D-1)/v) interleaved, min(T, 2D-1) for zb-h2; on the last rank 1, min(T, D - (D-1)/v) interleaved,
or as on the first where the family balances; where backwards are split, each holds the larger of what it keeps before its
input gradient and behind it. It ranks candidates; the simulator has the last word (systems.md O16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.layer_table import LEVELS, LayerTable
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.documents.profile import Recompute
from stagewright.planner.errors import InvalidArgument

Family = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v"]
FAMILIES: tuple[Family, ...] = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v")
SPLIT_FAMILIES = FAMILIES[3:]

BEFORE, BLOCK, BEHIND = range(3)


@dataclass(frozen=True)
class Choice:
    """One full configuration."""

    degrees: Degrees
    num_ranks: int
    num_chunks: int
    microbatch: int
    family: Family
    recompute: Recompute


@dataclass(frozen=True)
class StepEstimate:
    """What a configuration costs.

    Parameters
    ----------
    step_s : seconds of one optimizer step.
    peak_bytes : of the fuller one of the first and the last pipeline rank.
    pipeline_s, tail_s : the schedule, and what follows it on the rank that ends last.
    """

    step_s: float
    peak_bytes: float
    pipeline_s: float
    tail_s: float


@dataclass(frozen=True)
class RankTimes:
    """Seconds of one microbatch on a pipeline rank."""

    forward_s: float
    input_grad_s: float
    weight_grad_s: float

    @property
    def total_s(self) -> float:
        return self.forward_s + self.input_grad_s + self.weight_grad_s


def layer_roles(model: CostModel) -> npt.NDArray[np.int8]:
    """Return for each layer whether it stands before the blocks, is one, or stands behind them."""
    profile = model.profile
    kinds = [profile.classes[name].kind for name in profile.layer_classes]
    blocks = [index for index, kind in enumerate(kinds) if kind in ("block", "convolution")]
    if not blocks:
        return np.full(len(kinds), BLOCK, dtype=np.int8)
    roles = np.full(len(kinds), BLOCK, dtype=np.int8)
    roles[: blocks[0]] = BEFORE
    roles[blocks[-1] + 1 :] = BEHIND
    return roles


def estimate(model: CostModel, choice: Choice) -> StepEstimate:
    """Return the closed form of one configuration; raises InvalidArgument for one that the model cannot be split into."""
    _check(model, choice)
    degrees, job = choice.degrees, model.job
    count, ranks = job.global_batch // (degrees.dp * choice.microbatch), choice.num_ranks
    table = model.table(degrees, choice.microbatch)
    replicas = model.replica_table(degrees, choice.microbatch)
    level = LEVELS.index(choice.recompute)
    roles = layer_roles(model)
    shares = _shares(roles, ranks)
    forward = table.forward_s + replicas.forward_s
    backward = table.input_grad_s + table.recompute_s[level]
    weight = table.weight_grad_s + replicas.backward_s
    if choice.family in SPLIT_FAMILIES:
        weight = weight + table.split_excess_s
    first, inner, last = (
        RankTimes(float(share @ forward), float(share @ backward), float(share @ weight)) for share in shares
    )
    hop_s = hop_seconds(model, degrees, ranks, float(_boundary_bytes(table, roles)))
    pipeline_s = pipeline_seconds(
        choice.family,
        first,
        inner,
        last,
        num_ranks=ranks,
        num_microbatches=count,
        num_chunks=choice.num_chunks,
        hop_s=hop_s,
    )
    step = replicas.tail_s + replicas.optimizer_s
    latency_s = replicas.latency_s
    tails = [float(share @ step) + latency_s for share in (shares[0], shares[2])]
    live = live_microbatches(choice.family, ranks, count, choice.num_chunks)
    peaks = [
        _peak(model, degrees, table, level, share, alive, choice.family)
        for share, alive in zip((shares[0], shares[2]), live, strict=True)
    ]
    return StepEstimate(pipeline_s + max(tails), max(peaks), pipeline_s, max(tails))


def pipeline_seconds(
    family: Family,
    first: RankTimes,
    inner: RankTimes,
    last: RankTimes,
    *,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int,
    hop_s: float,
) -> float:
    """Return the seconds of the schedule, without what follows the last backward."""
    d, count, c = num_ranks, num_microbatches, hop_s
    if d == 1:
        return count * first.total_s
    inners = d - 2
    kinds = (first, inner, last) if inners else (first, last)
    total = first.total_s + inners * inner.total_s + last.total_s
    most = max(kind.total_s for kind in kinds)
    match family:
        case "gpipe":
            forward = max(kind.forward_s for kind in kinds)
            backward = max(kind.input_grad_s + kind.weight_grad_s for kind in kinds)
            return total + (count - 1) * (forward + backward) + 2 * (d - 1) * c
        case "1f1b":
            return _one_forward_one_backward(first, inner, last, total, d, count, c)
        case "interleaved":
            return count * most + (total - most) / num_chunks + 2 * (d * num_chunks - 1) * c
        case "zb-h1":
            bubble = max(0.0, inner.forward_s + inner.input_grad_s - inner.weight_grad_s)
        case "zb-h2":
            bubble = max(0.0, inner.forward_s + inner.input_grad_s - 2 * inner.weight_grad_s)
        case "zb-v":
            bubble = abs(inner.forward_s + inner.input_grad_s - 2 * inner.weight_grad_s) / 2
    return count * most + (d - 1) * bubble + 2 * (d - 1) * c


def _one_forward_one_backward(
    first: RankTimes, inner: RankTimes, last: RankTimes, total: float, d: int, count: int, c: float
) -> float:
    a, m, b = first.total_s, inner.total_s, last.total_s
    longest = count * (total / d + 2 * c * (d - 1) / d)
    ranks = [(0, a), (d - 1, b)] + [(rank, m) for rank in (1, d - 2) if 0 < rank < d - 1]
    for rank, own in ranks:
        before = 0.0 if rank == 0 else a + (rank - 1) * m
        longest = max(longest, before + count * own + 2 * rank * c)
        if count > d:
            behind = total - before - own
            longest = max(
                longest, before + (count - d + 1 + rank) * own + 2 * behind + (2 * rank + 4 * (d - 1 - rank)) * c
            )
    return longest


def live_microbatches(family: Family, num_ranks: int, num_microbatches: int, num_chunks: int) -> tuple[float, float]:
    """Return how many rank-microbatches are alive at most on the first and on the last pipeline rank."""
    d, count, v = num_ranks, num_microbatches, num_chunks
    match family:
        case "gpipe":
            return float(count), float(count)
        case "1f1b":
            return float(min(count, d)), 1.0
        case "interleaved":
            return min(count, d + (d - 1) / v), min(count, d - (d - 1) / v)
        case "zb-h2":
            return float(min(count, 2 * d - 1)), float(min(count, 2 * d - 1))
        case _:
            return float(min(count, d)), float(min(count, d))


def hop_seconds(model: CostModel, degrees: Degrees, num_ranks: int, size_bytes: float) -> float:
    """Return the seconds of a boundary tensor between neighbours, the slowest pair."""
    if num_ranks == 1:
        return 0.0
    width = degrees.num_devices
    crossing = next(
        (rank for rank in range(num_ranks - 1) if _crosses_node(model, rank * width, (rank + 1) * width)), 0
    )
    return model.boundary(degrees, crossing, crossing + 1).seconds(size_bytes)


def _crosses_node(model: CostModel, first: int, second: int) -> bool:
    inside = model.cluster.groups[0].links[0].num_devices
    return first // inside != second // inside


def _shares(roles: npt.NDArray[np.int8], num_ranks: int) -> tuple[npt.NDArray[np.float64], ...]:
    """Return how much of each layer the first, an inner and the last rank hold."""
    block = (roles == BLOCK) / num_ranks
    before, behind = (roles == BEFORE).astype(float), (roles == BEHIND).astype(float)
    if num_ranks == 1:
        return block + before + behind, block, block + before + behind
    return block + before, block, block + behind


def _boundary_bytes(table: LayerTable, roles: npt.NDArray[np.int8]) -> float:
    return float(table.output_bytes[roles == BLOCK].max(initial=0.0))


def _peak(
    model: CostModel,
    degrees: Degrees,
    table: LayerTable,
    level: int,
    share: npt.NDArray[np.float64],
    live: float,
    family: Family,
) -> float:
    dense, expert = float(share @ table.dense_parameters), float(share @ table.expert_parameters)
    states = model.states(dense, expert, degrees).total
    states += float(share @ table.frozen_parameters) * model.job.optimizer.parameter_bytes
    held = table.activation_bytes[level]
    if family in SPLIT_FAMILIES:
        held = np.maximum(held, table.late_bytes[level])
    activations = live * float(share @ held)
    workspace = float(np.where(share > 0, table.workspace_bytes[level], 0.0).max())
    return states + activations + workspace + model.base_bytes


def _check(model: CostModel, choice: Choice) -> None:
    reason = model.legality(choice.degrees, choice.microbatch)
    devices = choice.degrees.num_devices * choice.num_ranks
    if reason is None and devices > model.cluster.num_devices:
        reason = (
            f"dp * cp * tp * pp = {choice.degrees.num_devices} * {choice.num_ranks} = {devices} devices, the cluster has "
            f"{model.cluster.num_devices}"
        )
    if reason is not None:
        raise InvalidArgument(reason, field="degrees")
