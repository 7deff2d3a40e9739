"""Seconds of each layer's forward and backward within one microbatch of the running model.

The caches a layer finds are those its neighbours leave (hot), or with a `flush` between the layers none (flushed); the
flush is in nobody's seconds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stagewright.modeling import Batch, LayerChain
from stagewright.profiler.layer_hooks import LayerHooks
from stagewright.profiler.timing import Clock, CpuClock

_Boundary = tuple[object, object]

_SEED = 1  # a run seeds every layer of every microbatch, and that takes time too


@dataclass(frozen=True)
class LayerTimes:
    """Seconds by layer; `outside_s` is what one microbatch took beside its layers; `busy_share` is CPU over wall time."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    outside_s: float
    busy_share: float


def busy_share(clock: Clock, busy_s: float, wall_s: float) -> float:
    """Return CPU over wall time, where the CPU is what computes; 1 where it only launches work."""
    return busy_s / wall_s if isinstance(clock, CpuClock) and wall_s > 0 else 1.0


class LayerTimer:
    """Runs microbatches of a whole chain and times its layers; enter `hooks` once around all of them."""

    def __init__(self, chain: LayerChain, clock: Clock, *, flush: Callable[[], object] | None = None) -> None:
        self._chain = chain
        self._clock = clock
        self._flush = flush
        self._segment = chain.segment(0, chain.num_layers)
        self._forward: list[_Boundary] = []
        self._backward: dict[int, _Boundary] = {}
        self._left: Callable[[int], object] | None = None
        targets = {target for _, target in chain.edges}
        self._first_layers = frozenset(range(chain.num_layers)) - targets
        self._holds_first_boundary = False
        self._first_boundary: tuple[Tensor, ...] = ()
        self.hooks = LayerHooks(
            chain, entered=self._mark_forward, produced=self._hold_first_boundary, left=self._mark_backward
        )

    def full(self, batch: Batch, *, scale: float = 1.0, left: Callable[[int], object] | None = None) -> LayerTimes:
        """Run one forward and one fused backward that accumulates into `.grad`, as an interpreter does them.

        `left(i)` is called when the backward of all layers after i is done.
        """

        def backward(loss: Tensor) -> None:
            torch.autograd.backward((loss,), (torch.full_like(loss, scale),))

        self._left = left
        try:
            return self._run(batch, backward)
        finally:
            self._left = None

    def whole(self, batch: Batch, *, scale: float = 1.0) -> float:
        """Return the seconds of one forward and fused backward that nobody looks into; not to be called within `hooks`."""
        clock = self._clock
        clock.synchronize()
        first = clock.mark()
        (loss,) = self._segment(batch, seed=_SEED)[self._chain.num_layers - 1]
        torch.autograd.backward((loss,), (torch.full_like(loss, scale),))
        del loss
        last = clock.mark()
        clock.synchronize()
        return clock.seconds(first, last)

    def input_gradients(self, batch: Batch) -> LayerTimes:
        """Run one forward and a backward that computes no weight gradient; its seconds are the input gradients'."""

        def backward(loss: Tensor) -> None:
            if self._first_boundary:
                torch.autograd.grad((loss,), self._first_boundary, allow_unused=True)

        self._holds_first_boundary = True
        try:
            return self._run(batch, backward)
        finally:
            self._holds_first_boundary, self._first_boundary = False, ()

    def forward_only(self, batch: Batch) -> None:
        """Run one forward without gradients."""
        self.hooks.begin()
        with torch.no_grad():
            self._segment(batch)

    def _run(self, batch: Batch, backward: Callable[[Tensor], None]) -> LayerTimes:
        clock = self._clock
        clock.synchronize()
        self._forward, self._backward = [], {}
        wall, busy = time.perf_counter(), time.process_time()
        first = clock.mark()
        self.hooks.begin()
        (loss,) = self._segment(batch, seed=_SEED)[self._chain.num_layers - 1]
        turn = self._boundary()
        backward(loss)
        end = self._boundary()
        del loss
        last = clock.mark()
        clock.synchronize()
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        forward_s = self._between([*self._forward, turn])
        backward_s = self._backward_seconds(turn, end)
        flushed_s = sum(clock.seconds(*pair) for pair in (*self._forward, turn, *self._backward.values(), end))
        outside_s = clock.seconds(first, last) - sum(forward_s) - sum(backward_s) - flushed_s
        return LayerTimes(forward_s, backward_s, max(outside_s, 0.0), busy_share(clock, busy, wall))

    def _boundary(self) -> _Boundary:
        """Return the marks at the end of what was before and at the beginning of what comes: one, or around a flush."""
        end = self._clock.mark()
        if self._flush is None:
            return end, end
        self._flush()
        return end, self._clock.mark()

    def _backward_seconds(self, turn: _Boundary, end: _Boundary) -> tuple[float, ...]:
        """A layer whose output had no gradient is done when the backward is."""
        count = self._chain.num_layers
        marks = [self._backward.get(index, end) for index in range(count - 1)]
        return tuple(reversed(self._between([turn, *reversed(marks), end])))

    def _between(self, boundaries: list[_Boundary]) -> tuple[float, ...]:
        pairs = itertools.pairwise(boundaries)
        return tuple(max(self._clock.seconds(first[1], second[0]), 0.0) for first, second in pairs)

    def _mark_forward(self, index: int, tensors: tuple[Tensor, ...]) -> None:
        self._forward.append(self._boundary())

    def _hold_first_boundary(self, index: int, tensors: tuple[Tensor, ...]) -> None:
        if self._holds_first_boundary and index in self._first_layers:
            self._first_boundary += tensors

    def _mark_backward(self, index: int) -> None:
        if index not in self._backward:
            self._backward[index] = self._boundary()
            if self._left is not None:
                self._left(index)
