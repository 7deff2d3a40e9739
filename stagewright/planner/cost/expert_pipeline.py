"""Chunked expert layers: dispatch, experts and combine of r chunks of tokens overlap on two lanes.

One lane carries messages (dispatch and combine share it), the other computes. With chunk times d (dispatch), c (compute)
and k (combine) the order of the messages matters: dispatches first, then combines (PipeMoE, Shi et al. 2023; Tutel, Hwang
et al. 2023), or any interleaving (ScheMoE, Shi et al. 2024). The seconds of a part are fixed + linear / r, so more chunks
hide more but pay more fixed cost. `pipelined_s` simulates one order; `best_chunks` is PipeMoE's closed form with its two
cases, checked against all r.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt
from typing import Literal

from stagewright.planner.errors import InvalidArgument

MAX_CHUNKS = 16

Message = tuple[Literal["dispatch", "combine"], int]


@dataclass(frozen=True)
class Line:
    """Seconds of a part over r chunks: each chunk takes fixed_s + whole_s / r."""

    fixed_s: float
    whole_s: float

    def chunk_s(self, chunks: int) -> float:
        """Return the seconds of one of `chunks` chunks."""
        return self.fixed_s + self.whole_s / chunks


@dataclass(frozen=True)
class ExpertLayer:
    """The three parts of an expert layer; dispatch and combine move the same bytes."""

    exchange: Line
    compute: Line

    def seconds(self, chunks: int) -> float:
        """Return the layer's seconds with dispatches before combines."""
        return pipelined_s(self, chunks, dispatches_first(chunks))


def dispatches_first(chunks: int) -> tuple[Message, ...]:
    """Return the order of PipeMoE: all dispatches, then all combines."""
    return (
        *(("dispatch", index) for index in range(chunks)),
        *(("combine", index) for index in range(chunks)),
    )


def message_orders(chunks: int) -> Iterator[tuple[Message, ...]]:
    """Return every order in which each chunk is dispatched before it is combined, chunks in turn."""

    def grow(order: tuple[Message, ...], dispatched: int, combined: int) -> Iterator[tuple[Message, ...]]:
        if combined == chunks:
            yield order
            return
        if dispatched < chunks:
            yield from grow((*order, ("dispatch", dispatched)), dispatched + 1, combined)
        if combined < dispatched:
            yield from grow((*order, ("combine", combined)), dispatched, combined + 1)

    yield from grow((), 0, 0)


def pipelined_s(layer: ExpertLayer, chunks: int, order: Sequence[Message]) -> float:
    """Return the end of the last combine when messages run in `order` and chunks are computed as they arrive."""
    if chunks < 1:
        raise InvalidArgument(f"chunks is {chunks}, it must be at least 1", field="chunks")
    exchange_s, compute_s = layer.exchange.chunk_s(chunks), layer.compute.chunk_s(chunks)
    link_s, device_s = 0.0, 0.0
    computed: dict[int, float] = {}
    for kind, chunk in order:
        if kind == "dispatch":
            link_s += exchange_s
            device_s = max(device_s, link_s) + compute_s
            computed[chunk] = device_s
        else:
            link_s = max(link_s, computed[chunk]) + exchange_s
    return link_s


def best_order(layer: ExpertLayer, chunks: int) -> tuple[tuple[Message, ...], float]:
    """Return ScheMoE's fastest order of messages and its seconds, over all of them."""
    return min(
        ((order, pipelined_s(layer, chunks, order)) for order in message_orders(chunks)), key=lambda found: found[1]
    )


def best_chunks(layer: ExpertLayer, *, most: int = MAX_CHUNKS) -> int:
    """Return the number of chunks with the shortest layer, dispatches first, by PipeMoE's closed form.

    With x and c the whole exchange and compute, a and g their fixed parts, r chunks take the longest of
        (i)   2 r a + 2 x                                    messages back to back
        (ii)  2 a + 2 x / r + r g + c                        compute between the first dispatch and the last combine
    (i) grows in r; (ii) falls until r = sqrt(2 x / g). The best r is the least of the crossing and that root, or a
    neighbour.
    """
    a, x, g, c = layer.exchange.fixed_s, layer.exchange.whole_s, layer.compute.fixed_s, layer.compute.whole_s
    candidates = {1, most}
    if g > 0:
        candidates |= _around(sqrt(2 * x / g), most)
    # Crossing of (i) and (ii): (2a - g) r^2 + (2x - 2a - c) r - 2x = 0.
    quadratic, linear, constant = 2 * a - g, 2 * x - 2 * a - c, -2 * x
    if abs(quadratic) < 1e-30:
        if linear > 0:
            candidates |= _around(-constant / linear, most)
    else:
        root = linear**2 - 4 * quadratic * constant
        if root >= 0:
            for sign in (1.0, -1.0):
                candidates |= _around((-linear + sign * sqrt(root)) / (2 * quadratic), most)
    return min(sorted(candidates), key=lambda r: (layer.seconds(r), r))


def exhaustive_chunks(layer: ExpertLayer, *, most: int = MAX_CHUNKS) -> int:
    """Return the fastest of all r in 1..most."""
    return min(range(1, most + 1), key=lambda r: (layer.seconds(r), r))


def _around(value: float, most: int) -> set[int]:
    if not 0 < value < 1e9:
        return set()
    return {min(most, max(1, r)) for r in (floor(value) - 1, floor(value), ceil(value), ceil(value) + 1)}


def step_with_gradients_s(
    layers: Sequence[tuple[float, float, float]], *, priority: bool, chunk_s: float = float("inf")
) -> float:
    """Return the end of a backward whose layers exchange tokens on the link that also reduces gradients.

    `layers` holds (all-to-all, compute, gradient reduction) seconds of each layer in backward order. A layer's reduction
    becomes ready with its compute, and only the end of the step waits for it. Without priority the link serves whatever
    became ready first. With priority reductions run in chunks and only while no exchange waits, so an exchange waits for
    one chunk at most (Lina, Li et al. 2023).
    """
    compute_end_s = link_s = 0.0
    waiting: list[tuple[float, float]] = []

    def reduce_one() -> None:
        nonlocal link_s
        ready_s, left_s = waiting.pop(0)
        piece_s = min(left_s, chunk_s) if priority else left_s
        link_s = max(link_s, ready_s) + piece_s
        if left_s > piece_s:
            waiting.insert(0, (ready_s, left_s - piece_s))

    for exchange_s, compute_s, reduction_s in layers:
        while waiting and (max(link_s, waiting[0][0]) < compute_end_s if priority else waiting[0][0] <= compute_end_s):
            reduce_one()
        link_s = max(compute_end_s, link_s) + exchange_s
        compute_end_s = link_s + compute_s
        if reduction_s > 0:
            waiting.append((compute_end_s, reduction_s))
    while waiting:
        reduce_one()
    return max(compute_end_s, link_s)
