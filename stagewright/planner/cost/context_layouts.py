"""Attention over a sequence split on P devices: traffic, balance, memory and time of every published way.

Elements one device sends for one layer and microbatch, multi-head attention, bsh = batch x sequence x hidden:

    Megatron TP + SP     4 (t-1)/t bsh           4 (t-1)/t bsh                       Korthikanti et al. 2022
    Ulysses              4 (P-1)/P^2 bsh         4 (P-1)/P^2 bsh                     Jacobs et al. 2023
    ring                 2 (P-1)/P bsh           4 (P-1)/P bsh                       Liu et al. 2023
    Burst                2 (P-1)/P bsh           (P-1)/P (3 bsh + 2 b s a)           Sun et al. 2024
    RSA                  4 (P-1)/P bsh           4 (P-1)/P bsh                       Li et al. 2021
    USP, P = u r         4 bsh/P (u-1)/u + 2 bsh/P (r-1)    the ring part twice      Fang and Zhao 2024
    WallFacer, teams C   2 bsh C/P (P/C^2-1) + 4 bsh (C-1)/P    the ring part twice  Liu et al. 2024
    DSP                  2 (P-1)/P^2 bsh         2 (P-1)/P^2 bsh                     Zhao et al. 2024

Keys and values of grouped heads shrink what the ring moves by a_kv / a. All-gathering them (Llama 3) sends as much as the
ring forward and reduces as much backward. Causal masks leave work uneven unless tokens are dealt out evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from stagewright.planner.cost.communication import collective_s, neighbour_s
from stagewright.planner.cost.groups import GroupShape, strided_group
from stagewright.planner.documents.cluster import NodeGroup
from stagewright.planner.errors import InvalidArgument


class TokenOrder(StrEnum):
    """Which tokens a device holds: a contiguous part, every P-th, or chunks i and 2P-1-i."""

    CONTIGUOUS = "contiguous"
    STRIPED = "striped"
    ZIG_ZAG = "zig-zag"


@dataclass(frozen=True)
class AttentionSizes:
    """One layer's attention; `kv_share` is key-value heads over heads (1 for multi-head attention)."""

    batch: int
    sequence: int
    hidden: int
    heads: int
    kv_share: float = 1.0

    @property
    def elements(self) -> float:
        """bsh."""
        return float(self.batch) * self.sequence * self.hidden


@dataclass(frozen=True)
class Traffic:
    """Elements one device sends, forward and backward."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def tensor_sequence_traffic(sizes: AttentionSizes, t: int) -> Traffic:
    """Return Megatron's tensor with sequence parallelism: two gathers and two scatters each way, the whole layer."""
    one_way = 4 * (t - 1) / t * sizes.elements
    return Traffic(one_way, one_way)


def ulysses_traffic(sizes: AttentionSizes, degree: int) -> Traffic:
    """Return four all-to-alls each way: queries, keys, values, output."""
    tensors = 2 + 2 * sizes.kv_share
    one_way = tensors * (degree - 1) / degree**2 * sizes.elements
    return Traffic(one_way, one_way)


def ring_traffic(sizes: AttentionSizes, degree: int) -> Traffic:
    """Return keys and values forward; keys, values and their gradients backward."""
    forward = 2 * sizes.kv_share * (degree - 1) / degree * sizes.elements
    return Traffic(forward, 2 * forward)


def burst_traffic(sizes: AttentionSizes, degree: int) -> Traffic:
    """Return a backward that circulates Q, dO, dQ and two statistics a head in place of K, V, dK, dV."""
    share = (degree - 1) / degree
    statistics = 2.0 * sizes.batch * sizes.sequence * sizes.heads
    return Traffic(ring_traffic(sizes, degree).forward, share * (3 * sizes.elements + statistics))


def ring_self_attention_traffic(sizes: AttentionSizes, degree: int) -> Traffic:
    """Return ring self-attention: keys and values forward, then their gradients' all-reduces, 8 (P-1)/P bsh in all."""
    one_way = 4 * (degree - 1) / degree * sizes.elements
    return Traffic(one_way, one_way)


def gathered_traffic(sizes: AttentionSizes, degree: int) -> Traffic:
    """Return all-gathered keys and values (Llama 3): as the ring forward, reduce-scatter of their gradients backward."""
    forward = 2 * sizes.kv_share * (degree - 1) / degree * sizes.elements
    return Traffic(forward, 2 * forward)


def usp_traffic(sizes: AttentionSizes, ulysses: int, ring: int) -> Traffic:
    """Return heads exchanged inside groups of u, a ring over r groups; u = P is Ulysses, r = 1, and u = 1 the ring."""
    degree = ulysses * ring
    tensors = 2 + 2 * sizes.kv_share
    exchange = tensors * sizes.elements / degree * (ulysses - 1) / ulysses
    shift = 2 * sizes.kv_share * sizes.elements / degree * (ring - 1)
    return Traffic(exchange + shift, exchange + 2 * shift)


def wallfacer_traffic(sizes: AttentionSizes, degree: int, team: int) -> Traffic:
    """Return teams of C: Q, K, V gathered inside a team, a ring of P/C^2 steps on larger blocks, outputs reduced.

    A block of C parts travels P/C^2 - 1 hops: 2 bsh C/P (P/C^2 - 1), which is 2 bsh/C for large P; gathers and the reduction
    inside a team cost (C-1)/P bsh for each of Q, K, V and O. One member is the ring.
    """
    _check_team(degree, team)
    steps = degree // team**2
    hops = 2 * sizes.kv_share * sizes.elements * team / degree * (steps - 1)
    inside = (2 + 2 * sizes.kv_share) * sizes.elements * (team - 1) / degree
    return Traffic(hops + inside, 2 * hops + inside)


def switch_traffic(sizes: AttentionSizes, degree: int, *, switches: int = 2) -> Traffic:
    """Return dynamic sequence parallelism: one all-to-all of x at each switch of the split dimension.

    A spatial and a temporal block need two switches each way, where Ulysses exchanges four tensors in each attention.
    """
    one_way = switches * (degree - 1) / degree**2 * sizes.elements
    return Traffic(one_way, one_way)


def causal_blocks(degree: int, order: TokenOrder) -> list[list[int]]:
    """Return work[step][device] of a causal ring in units of one chunk pair; a diagonal pair counts whole.

    Zig-zag chunks are half as long, so a device holds two of 2P; striped tokens make every pair near-triangular, half work.
    """
    steps = []
    for step in range(degree):
        row = []
        for device in range(degree):
            source = (device - step) % degree
            if order is TokenOrder.CONTIGUOUS:
                row.append(1 if source <= device else 0)
            elif order is TokenOrder.STRIPED:
                row.append(1)
            else:
                mine, theirs = (device, 2 * degree - 1 - device), (source, 2 * degree - 1 - source)
                row.append(sum(1 for query in mine for key in theirs if key <= query))
        steps.append(row)
    return steps


def causal_imbalance(degree: int, order: TokenOrder) -> float:
    """Return slowest over mean work of a causal ring: 2P/(P+1) for contiguous parts, 1 for striped and zig-zag."""
    totals = [sum(row[device] for row in causal_blocks(degree, order)) for device in range(degree)]
    return max(totals) * len(totals) / sum(totals)


def causal_idle_fraction(degree: int, *, balanced: bool) -> float:
    """Return idle over all P^2 block slots: (P-1)/(2P) for contiguous parts; helped by idle devices 0, or 1/(2P) when
    P is even (DistFlashAttn, Li et al. 2023)."""
    if not balanced:
        used = degree * (degree + 1) / 2
        return 1 - used / degree**2
    return idle_slots(helper_schedule(degree)) / degree**2


def helper_schedule(degree: int) -> list[list[tuple[int, int] | None]]:
    """Return schedule[step][device] = (query part, key part) of DistFlashAttn's balanced causal attention.

    In step t device p works on its own queries with part p - t. Devices that have no such part, p < t, take over a pair
    of a device with many: the queries of device P - t + p travel to p, which holds part p. When P is even the last step has
    each pair twice, so one half of it is left idle.
    """
    schedule: list[list[tuple[int, int] | None]] = []
    for step in range(degree // 2 + 1):
        row: list[tuple[int, int] | None] = []
        for device in range(degree):
            if device >= step:
                row.append((device, device - step))
            else:
                helped = degree - step + device
                # For even P the last step's helped pair equals the owner's own pair of that step.
                twice = 2 * step == degree
                row.append(None if twice else (helped, device))
        schedule.append(row)
    return schedule


def idle_slots(schedule: Sequence[Sequence[tuple[int, int] | None]]) -> int:
    """Return how many device steps have no pair."""
    return sum(pair is None for row in schedule for pair in row)


def ring_attention_s(
    block_s: float, block_bytes: float, group: GroupShape, *, work: Sequence[Sequence[float]] | None = None
) -> float:
    """Return the seconds of a lock-step ring: each step computes while keys and values move on; the last moves nothing.

    `work` scales the block's seconds by step and device (causal masks); the slowest device decides each step.
    """
    degree = group.size
    if degree == 1:
        return block_s
    shift_s = neighbour_s(block_bytes, group)
    total = 0.0
    for step in range(degree):
        compute_s = block_s * (max(work[step]) if work is not None else 1.0)
        total += max(compute_s, shift_s) if step < degree - 1 else compute_s
    return total


def least_block_tokens(flops_per_s: float, bytes_per_s: float, *, element_bytes: float = 2.0) -> float:
    """Return the block length from which a ring hides its transfers: 4 c^2 d FLOP over 2 c d elements, c >= F e / (2 B).

    Liu et al. 2023 state c >= FLOPS / bandwidth for 2-byte elements.
    """
    return flops_per_s * element_bytes / (2 * bytes_per_s)


def double_ring_s(block_bytes: float, inner: GroupShape, outer: GroupShape) -> float:
    """Return the transfer seconds of LoongTrain's double ring: windows of w inside nodes, r/w outer hops that run
    while a window turns."""
    w, windows = max(1, inner.size), max(1, outer.size)
    inside_s = (w - 1) * (neighbour_s(block_bytes, inner) if w > 1 else 0.0)
    outside_s = neighbour_s(block_bytes, outer) if windows > 1 else 0.0
    return (windows - 1) * max(outside_s, inside_s) + inside_s


def outer_hops(ring: int, window: int) -> int:
    """Return the hops of a double ring that leave the node: r/w - 1, against r - 1 with a single ring over r nodes."""
    if ring % window:
        raise InvalidArgument(f"a window of {window} does not divide the ring of {ring}", field="window")
    return ring // window - 1


@dataclass(frozen=True)
class ContextSplit:
    """A two-dimensional split of the sequence: heads exchanged in groups of u, a ring over r, and its seconds."""

    ulysses: int
    ring: int
    head_first: bool
    seconds: float


def context_split_s(
    sizes: AttentionSizes,
    ulysses: int,
    ring: int,
    group: NodeGroup,
    *,
    head_first: bool = True,
    attention_s: float = 0.0,
    element_bytes: float = 2.0,
) -> float:
    """Return the visible transfer seconds of one layer, forward and backward.

    The ring hides under `attention_s`, a device's attention in both passes; the exchange of heads hides under nothing.
    `head_first` puts the exchange on adjacent devices and the ring at distance u; context-first is the reverse
    (LoongTrain, Gu et al. 2024).
    """
    degree = ulysses * ring
    heads = strided_group(ulysses, 1 if head_first else ring, group)
    around = strided_group(ring, ulysses if head_first else 1, group)
    local = sizes.elements / degree * element_bytes
    exchange_s = 4 * collective_s("all-to-all", local, heads) + 4 * collective_s(
        "all-to-all", local * sizes.kv_share, heads
    )
    # Two tensors a hop forward, four backward.
    shift_s = neighbour_s(2 * local * sizes.kv_share, around) if ring > 1 else 0.0
    return exchange_s + max(0.0, 3 * (ring - 1) * shift_s - attention_s)


def best_context_split(
    sizes: AttentionSizes, degree: int, group: NodeGroup, *, kv_heads: int | None = None, attention_s: float = 0.0
) -> ContextSplit:
    """Return the u x r = P with the shortest visible transfers on the links; u divides the key-value heads."""
    limit = kv_heads or sizes.heads
    candidates = [
        ContextSplit(
            u,
            degree // u,
            head_first,
            context_split_s(sizes, u, degree // u, group, head_first=head_first, attention_s=attention_s),
        )
        for u in range(1, degree + 1)
        if degree % u == 0 and limit % u == 0
        for head_first in (True, False)
    ]
    return min(candidates, key=lambda split: (split.seconds, -split.ulysses, not split.head_first))


def best_team(sizes: AttentionSizes, degree: int, group: NodeGroup, *, element_bytes: float = 2.0) -> tuple[int, float]:
    """Return WallFacer's team size C and its transfer seconds, forward and backward; C^2 divides P."""
    found: list[tuple[float, int]] = []
    for team in range(1, degree + 1):
        if degree % team**2:
            continue
        steps = degree // team**2
        inside = strided_group(team, 1, group)
        around = strided_group(steps, team**2, group)
        local = sizes.elements / degree * element_bytes
        gathered = local * team
        seconds = 2 * (2 + 2 * sizes.kv_share) * collective_s("all-gather", gathered, inside)
        if steps > 1:
            seconds += 3 * (steps - 1) * neighbour_s(2 * gathered * sizes.kv_share, around)
        found.append((seconds, team))
    seconds, team = min(found)
    return team, seconds


def score_bytes(sizes: AttentionSizes, degree: int) -> float:
    """Return the bytes of scores that ring self-attention keeps on a device: 5 a s^2 b / P, no online soft-max."""
    return 5.0 * sizes.heads * float(sizes.sequence) ** 2 * sizes.batch / degree


def _check_team(degree: int, team: int) -> None:
    if team < 1 or degree % team**2:
        raise InvalidArgument(f"teams of {team} need {team}^2 = {team**2} to divide the degree {degree}", field="team")
