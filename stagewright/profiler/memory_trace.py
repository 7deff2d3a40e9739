"""What the allocator does while a microbatch runs: each layer's workspace, and the peak of a whole step.

On CPU the trace is that of torch's profiler, which reports every allocation with its size in order, temporary buffers
inside operators included. On CUDA the allocator's own peak counter is read and reset at each boundary.

A layer's workspace is the highest allocation during its forward or backward, above the activations that it and the
layers before it keep. So the peak of a microbatch is the largest, over layers, of kept prefix plus workspace: exactly
for the model that was traced, and nearly for a stage of some of its layers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch

from stagewright.modeling import Batch, LayerChain
from stagewright.modeling.allocations import Change, mark, watch_allocations
from stagewright.profiler.layer_hooks import LayerHooks


@dataclass(frozen=True)
class Span:
    """Between two marks: bytes allocated at the beginning and at the end, and the highest value between."""

    begin_bytes: float
    end_bytes: float
    peak_bytes: float


def trace_spans(work: Callable[[Callable[[], None]], None], device: torch.device) -> list[Span]:
    """Return the spans between the marks that `work` sets by calling its argument.

    Bytes count from an unknown level on, the same for all spans: what lived before the trace is not in them on CPU.
    Garbage of earlier work is collected first: its release would be taken off what `work` allocates.
    """
    gc.collect()
    return _cuda_spans(work, device) if device.type == "cuda" else _cpu_spans(work)


def peak_above_start(work: Callable[[], object], device: torch.device) -> float:
    """Return the most bytes allocated during `work` above those allocated before it."""

    def marked(mark: Callable[[], None]) -> None:
        mark()
        work()
        mark()

    (span,) = trace_spans(marked, device)
    return span.peak_bytes - span.begin_bytes


def layer_workspace_bytes(
    chain: LayerChain, batch: Batch, saved_bytes: Sequence[float], device: torch.device
) -> tuple[float, ...]:
    """Return the workspace of each layer for one microbatch, given what each keeps; gradients must be allocated."""
    segment = chain.segment(0, chain.num_layers)
    order: list[int] = []

    def work(mark: Callable[[], None]) -> None:
        def boundary(index: int) -> None:
            order.append(index)
            mark()

        with LayerHooks(chain, entered=lambda index, tensors: boundary(index), left=boundary) as hooks:
            hooks.begin()
            (loss,) = segment(batch)[chain.num_layers - 1]
            boundary(chain.num_layers - 1)
            loss.backward()
            del loss
            boundary(0)

    spans = trace_spans(work, device)
    kept = list(accumulate(saved_bytes))
    workspace = [0.0] * chain.num_layers
    for index, span in zip(order, spans, strict=False):
        peak = span.peak_bytes - spans[0].begin_bytes
        workspace[index] = max(workspace[index], peak - kept[index])
    return tuple(workspace)


@dataclass(frozen=True)
class LayerGrowths:
    """Of a forward, by layer: by how much the allocated bytes grow, and the most above those before the first layer."""

    kept: tuple[float, ...]
    peaks: tuple[float, ...]

    def workspaces(self, kept_bytes: Sequence[float]) -> list[float]:
        """Return the highest use of each layer above what it and the layers before it keep until their backward."""
        rows = zip(self.peaks, accumulate(kept_bytes), strict=True)
        return [max(peak - kept, 0.0) for peak, kept in rows]


def layer_growths(chain: LayerChain, batch: Batch, device: torch.device) -> LayerGrowths:
    """Return what is allocated in a forward from each layer's entrance to the next one's."""
    segment = chain.segment(0, chain.num_layers)

    def work(mark: Callable[[], None]) -> None:
        with LayerHooks(chain, entered=lambda index, tensors: mark()) as hooks:
            hooks.begin()
            (loss,) = segment(batch)[chain.num_layers - 1]
            mark()
            del loss

    spans = trace_spans(work, device)
    begin = spans[0].begin_bytes
    return LayerGrowths(
        tuple(span.end_bytes - span.begin_bytes for span in spans), tuple(span.peak_bytes - begin for span in spans)
    )


def _cuda_spans(work: Callable[[Callable[[], None]], None], device: torch.device) -> list[Span]:
    spans: list[Span] = []
    begin: list[float] = []

    def mark() -> None:
        now = float(torch.cuda.memory_allocated(device))
        if begin:
            spans.append(Span(begin[-1], now, float(torch.cuda.max_memory_allocated(device))))
        begin.append(now)
        torch.cuda.reset_peak_memory_stats(device)

    work(mark)
    return spans


def _cpu_spans(work: Callable[[Callable[[], None]], None]) -> list[Span]:
    def boundary() -> None:
        with mark("boundary"):
            pass

    watch = watch_allocations(partial(work, boundary))
    return _spans_of([each.begin_us for each in watch.marks], watch.changes)


def _spans_of(boundaries: list[float], changes: list[Change]) -> list[Span]:
    spans = []
    level, position = 0.0, 0
    while boundaries and position < len(changes) and changes[position].time_us < boundaries[0]:
        level += changes[position].size
        position += 1
    for end in boundaries[1:]:
        begin = peak = level
        while position < len(changes) and changes[position].time_us < end:
            level += changes[position].size
            peak = max(peak, level)
            position += 1
        spans.append(Span(begin, level, peak))
    return spans
