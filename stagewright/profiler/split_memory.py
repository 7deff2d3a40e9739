"""What each layer holds while its input and its weight gradients run apart, as the allocator sees it.

In an input gradient the layers before keep what their forwards left, and those behind hold what waits for their weight
gradients. The weight gradients run afterwards from the first layer to the last, as a stage runs them, and each layer's
products are made beside what still waits: its own, less what it has finished, and that of all behind it. Gradients are
summed where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from stagewright.modeling import Batch, LayerChain
from stagewright.modeling.weight_gradients import DeferredGradient, Queue, WeightGradientSink, run_queue
from stagewright.profiler.layer_hooks import LayerHooks
from stagewright.profiler.memory_trace import trace_spans
from stagewright.profiler.saved_bytes import storage_bytes, storage_key


@dataclass(frozen=True)
class SplitWorkspaces:
    """Bytes by layer: the highest use of its input gradient above the larger of what it keeps and what waits, and of its weight gradient above what waits."""

    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]


def split_workspaces(
    chain: LayerChain, batch: Batch, saved_bytes: Sequence[float], sink: WeightGradientSink, device: torch.device
) -> SplitWorkspaces:
    """Return the workspaces of one microbatch, given what each layer keeps and where its gradients wait; they must be allocated."""
    count = chain.num_layers
    segment = chain.segment(0, count)
    order: list[int] = []  # the layer of each span, those of weight gradients behind the others
    waiting = [0.0] * count

    def work(mark: Callable[[], None]) -> None:
        lengths: dict[int, int] = {}

        def note(index: int) -> None:
            order.append(index)
            mark()

        def left(index: int) -> None:
            lengths.setdefault(index, len(queue))
            note(index)

        note(-1)
        with LayerHooks(chain, left=left) as hooks, sink.collect() as queue:
            hooks.begin()
            (loss,) = segment(batch)[count - 1]
            left(count - 1)
            loss.backward()
            del loss
        pieces = pieces_by_layer(queue, lengths, count)
        waiting[:] = map(queue_bytes, pieces)
        for index, piece in enumerate(pieces):
            note(count + index)
            run_queue(piece)
        note(-1)

    spans = trace_spans(work, device)
    begin = spans[0].begin_bytes
    found = [0.0] * (2 * count)
    for index, span in zip(order, spans, strict=False):
        if index < 0:
            continue
        layer = index % count
        beside = sum(waiting[layer:])
        if index < count:
            beside = sum(saved_bytes[:layer]) + max(saved_bytes[layer], waiting[layer]) + sum(waiting[layer + 1 :])
        found[index] = max(found[index], span.peak_bytes - begin - beside)
    return SplitWorkspaces(tuple(found[:count]), tuple(found[count:]))


def pieces_by_layer(queue: Queue, lengths: Mapping[int, int], count: int) -> list[Queue]:
    """Return each layer's part of a queue and empty it, given how long it was when the backward of all layers behind one was done."""
    ends = [len(queue), *(lengths.get(index - 1, len(queue)) for index in range(1, count))]
    pieces, done = list[Queue](), 0
    for end in reversed(ends):
        pieces.append(queue[done:end])
        done = max(end, done)
    queue.clear()
    return pieces[::-1]


def queue_bytes(queue: Sequence[DeferredGradient]) -> float:
    """Return the bytes that deferred weight gradients hold, each storage once."""
    tensors = [tensor for item in queue for tensor in (item.saved, item.gradient)]
    return float(sum({storage_key(tensor): storage_bytes(tensor) for tensor in tensors}.values()))
