"""Whole transformer blocks with experts in chunks: attention, gate, exchange and experts share two lanes (FlowMoE).

Overlapping an expert layer alone (`expert_pipeline`) leaves the link idle under attention and the device idle at both ends
of every layer. Chunks of a microbatch that go through whole blocks fill both: while chunk 0 is on the link, chunk 1 is in
attention. Block l of chunk i is

    attention and gate  A(l, i)  on the device, behind K(l - 1, i)
    dispatch            D(l, i)  on the link
    experts             C(l, i)  on the device
    combine             K(l, i)  on the link

Each lane runs one task at a time and never waits while one is ready: of the earliest block first, and in it the earliest part
of any chunk, or the earliest chunk; the better of the two rules counts. Every order of small cases is at most a few percent
faster. A part of r chunks takes fixed + whole / r each time (`Line`), so more chunks hide more and pay more fixed cost;
`best_flow_chunks` tries all r. `flow_bound_s` holds for any order: each lane's work behind the first way in and before the
last way out. O(L r log(L r)).

Papers: Gao et al., FlowMoE, 2025, from the abstract (attention, gate and all-to-all in one pipeline; its chunked
gradient reductions are `expert_pipeline.step_with_gradients_s`); Jiang et al., Lancet, MLSys 2024 (whole-graph overlap).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stagewright.planner.cost.expert_pipeline import MAX_CHUNKS, ExpertLayer, Line
from stagewright.planner.errors import InvalidArgument

_ON_LINK = (False, True, False, True)  # A, D, C, K


@dataclass(frozen=True)
class ExpertBlock:
    """Attention with the gate, and the expert layer behind it."""

    attention: Line
    experts: ExpertLayer

    def parts_s(self, chunks: int) -> tuple[float, float, float, float]:
        """Return the seconds of A, D, C and K of one of `chunks` chunks."""
        exchange_s = self.experts.exchange.chunk_s(chunks)
        return self.attention.chunk_s(chunks), exchange_s, self.experts.compute.chunk_s(chunks), exchange_s

    def separate_s(self, chunks: int) -> float:
        """Return the seconds of whole attention and then of the expert layer in chunks."""
        return self.attention.chunk_s(1) + self.experts.seconds(chunks)


def flow_s(block: ExpertBlock, chunks: int, *, num_blocks: int = 1) -> float:
    """Return the seconds of `num_blocks` equal blocks whose chunks flow through all of them, under the better rule.

    Raises InvalidArgument for fewer than one chunk or block.
    """
    _check(chunks, num_blocks)
    return min(_listed_s(block.parts_s(chunks), chunks, num_blocks, rule) for rule in _RULES)


Task = tuple[int, int, int]  # block, chunk, part


def _by_chunk(task: Task) -> Task:
    return task[0], task[1], -task[2]


def _by_part(task: Task) -> Task:
    return task[0], task[2], task[1]


_RULES: tuple[Callable[[Task], Task], ...] = (_by_part, _by_chunk)


def _listed_s(parts_s: Sequence[float], chunks: int, num_blocks: int, rule: Callable[[Task], Task]) -> float:
    """Return the end of the last task where each lane takes the ready task that the rule puts first."""
    free_s = [0.0, 0.0]
    waiting: list[tuple[float, Task]] = [(0.0, (0, chunk, 0)) for chunk in range(chunks)]
    ready: list[list[tuple[Task, Task]]] = [[], []]  # by lane
    while waiting or ready[0] or ready[1]:
        soonest = min(((free_s[lane], lane) for lane in (0, 1) if ready[lane]), default=None)
        if waiting and (soonest is None or waiting[0][0] <= soonest[0]):
            ready_s, task = heapq.heappop(waiting)
            lane = int(_ON_LINK[task[2]])
            if not ready[lane]:
                free_s[lane] = max(free_s[lane], ready_s)
            heapq.heappush(ready[lane], (rule(task), task))
            continue
        assert soonest is not None
        lane = soonest[1]
        level, chunk, part = heapq.heappop(ready[lane])[1]
        free_s[lane] += parts_s[part]
        following = (level, chunk, part + 1) if part < 3 else (level + 1, chunk, 0)
        if following[0] < num_blocks:
            heapq.heappush(waiting, (free_s[lane], following))
    return max(free_s)


def flow_bound_s(block: ExpertBlock, chunks: int, *, num_blocks: int = 1) -> float:
    """Return seconds that no order of the same chunks can beat."""
    _check(chunks, num_blocks)
    attention_s, exchange_s, experts_s, _ = block.parts_s(chunks)
    device_s = chunks * num_blocks * (attention_s + experts_s) + exchange_s
    link_s = attention_s + 2 * chunks * num_blocks * exchange_s
    chain_s = num_blocks * sum(block.parts_s(chunks))
    return max(device_s, link_s, chain_s)


def best_flow_chunks(block: ExpertBlock, *, num_blocks: int = 1, most: int = MAX_CHUNKS) -> int:
    """Return the number of chunks, up to `most`, whose blocks are fastest; the fewest of equal ones."""
    return min(range(1, most + 1), key=lambda chunks: (flow_s(block, chunks, num_blocks=num_blocks), chunks))


def _check(chunks: int, num_blocks: int) -> None:
    for field, value in (("chunks", chunks), ("num_blocks", num_blocks)):
        if value < 1:
            raise InvalidArgument(f"{field} is {value}, it must be at least 1", field=field)
