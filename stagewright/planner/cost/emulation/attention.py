"""Attention on emulated devices that each hold a part of the sequence, forward and backward, with counted traffic.

One head, queries Q, keys K, values V of [s, d], P parts. The blockwise forward keeps for each query row the running
maximum m, the sum l of exp(score - m) and the weighted sum of values (Milakov and Gimelshein 2018; FlashAttention):

    m' = max(m, max S)    l' = l e^{m-m'} + sum e^{S-m'}    O' = O e^{m-m'} + e^{S-m'} V

Two backwards give the same gradients. The ring's sends keys and values round with their gradients (4 tensors a hop);
Burst's (Sun et al. 2024) leaves them at home and sends queries, output gradients, query gradients and two statistics a row,
3 s d + 2 s numbers. With L = m + log l and D = rowsum(dO * O), for each pair of parts

    P = exp(Q K' - L)    dV += P' dO    dS = P * (dO V' - D)    dQ += dS K    dK += dS' Q
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.context_layouts import TokenOrder, helper_schedule
from stagewright.planner.cost.emulation.wire import Array, Wire

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Gradients:
    """Gradients of queries, keys and values in the order of the sequence."""

    query: Array
    key: Array
    value: Array


def token_parts(length: int, degree: int, order: TokenOrder) -> list[npt.NDArray[np.int64]]:
    """Return the positions each device holds."""
    positions = np.arange(length)
    match order:
        case TokenOrder.CONTIGUOUS:
            return list(np.split(positions, degree))
        case TokenOrder.STRIPED:
            return [positions[device::degree] for device in range(degree)]
        case TokenOrder.ZIG_ZAG:
            chunks = np.split(positions, 2 * degree)
            return [np.concatenate((chunks[i], chunks[2 * degree - 1 - i])) for i in range(degree)]


class SplitAttention:
    """Attention of one head whose sequence lies on P emulated devices."""

    def __init__(self, query: Array, key: Array, value: Array, degree: int, *, causal: bool, order: TokenOrder) -> None:
        self.degree = degree
        self.parts = token_parts(len(query), degree, order)
        self._causal = causal
        self._scale = query.shape[1] ** -0.5
        self._query = [query[part] for part in self.parts]
        self._key = [key[part] for part in self.parts]
        self._value = [value[part] for part in self.parts]
        self._sum = [np.zeros(len(part)) for part in self.parts]
        self._output: list[Array] = []

    def ring_forward(self) -> tuple[Array, Wire]:
        """Return the output, and the traffic of keys and values that circulate P-1 hops."""
        wire = Wire(self.degree)
        self._output = []
        for device in range(self.degree):
            state = _Running(len(self._query[device]), self._value[0].shape[1])
            for step in range(self.degree):
                source = (device - step) % self.degree
                if step:
                    wire.send(self._key[source], (device - 1) % self.degree, device)
                    wire.send(self._value[source], (device - 1) % self.degree, device)
                state.add(self._scores(device, source), self._value[source])
            self._output.append(state.output())
            self._sum[device] = state.log_sum()
        return self._joined(self._output), wire

    def helped_forward(self) -> tuple[Array, Wire, int]:
        """Return the output of DistFlashAttn's balanced causal schedule, its traffic, and its number of steps.

        A helper computes a pair for another device's queries and sends output and statistics back.
        """
        wire = Wire(self.degree)
        states = [_Running(len(query), self._value[0].shape[1]) for query in self._query]
        schedule = helper_schedule(self.degree)
        for row in schedule:
            for device, pair in enumerate(row):
                if pair is None:
                    continue
                owner, source = pair
                if owner == device:
                    wire.send(self._key[source], source, device)
                    wire.send(self._value[source], source, device)
                    states[owner].add(self._scores(owner, source), self._value[source])
                else:
                    wire.send(self._query[owner], owner, device)
                    partial = _Running(len(self._query[owner]), self._value[0].shape[1])
                    partial.add(self._scores(owner, source), self._value[source])
                    wire.send(partial.weighted, device, owner)
                    wire.send(partial.largest, device, owner)
                    wire.send(partial.total, device, owner)
                    states[owner].merge(partial)
        self._output = [state.output() for state in states]
        self._sum = [state.log_sum() for state in states]
        return self._joined(self._output), wire, len(schedule)

    def ring_backward(self, output_gradient: Array) -> tuple[Gradients, Wire]:
        """Return the gradients, and the traffic of K, V, dK and dV circulating P-1 hops and going home."""
        wire, gradients = Wire(self.degree), self._backward(output_gradient)
        for device in range(self.degree):
            before = (device - 1) % self.degree
            for _ in range(self.degree - 1):
                for block in (self._key[0], self._value[0], self._key[0], self._value[0]):
                    wire.send(block, before, device)
        return gradients, wire

    def burst_backward(self, output_gradient: Array) -> tuple[Gradients, Wire]:
        """Return the same gradients with keys and values at rest: Q, dO, dQ, L and D circulate."""
        wire = Wire(self.degree)
        local = [output_gradient[part] for part in self.parts]
        dots = [(local[i] * self._output[i]).sum(axis=1) for i in range(self.degree)]
        dq = [np.zeros_like(block) for block in self._query]
        dk = [np.zeros_like(block) for block in self._key]
        dv = [np.zeros_like(block) for block in self._value]
        for step in range(self.degree):
            for device in range(self.degree):
                visitor = (device - step) % self.degree
                if step:
                    before = (device - 1) % self.degree
                    for block in (self._query[visitor], local[visitor], dq[visitor], self._sum[visitor], dots[visitor]):
                        wire.send(block, before, device)
                self._pair_gradients(visitor, device, local, dots, dq, dk, dv)
        return self._gathered(dq, dk, dv), wire

    def _backward(self, output_gradient: Array) -> Gradients:
        local = [output_gradient[part] for part in self.parts]
        dots = [(local[i] * self._output[i]).sum(axis=1) for i in range(self.degree)]
        dq = [np.zeros_like(block) for block in self._query]
        dk = [np.zeros_like(block) for block in self._key]
        dv = [np.zeros_like(block) for block in self._value]
        for device in range(self.degree):
            for source in range(self.degree):
                self._pair_gradients(device, source, local, dots, dq, dk, dv)
        return self._gathered(dq, dk, dv)

    def _pair_gradients(
        self,
        owner: int,
        source: int,
        local: Sequence[Array],
        dots: Sequence[Array],
        dq: list[Array],
        dk: list[Array],
        dv: list[Array],
    ) -> None:
        probabilities = np.exp(self._scores(owner, source) - self._sum[owner][:, None])
        dv[source] += probabilities.T @ local[owner]
        scores = probabilities * (local[owner] @ self._value[source].T - dots[owner][:, None]) * self._scale
        dq[owner] += scores @ self._key[source]
        dk[source] += scores.T @ self._query[owner]

    def _scores(self, owner: int, source: int) -> Array:
        scores = self._query[owner] @ self._key[source].T * self._scale
        if self._causal:
            hidden: Bools = self.parts[owner][:, None] < self.parts[source][None, :]
            scores = np.where(hidden, -np.inf, scores)
        return np.asarray(scores)

    def _joined(self, blocks: Sequence[Array]) -> Array:
        joined = np.empty((sum(len(block) for block in blocks), blocks[0].shape[1]))
        for part, block in zip(self.parts, blocks, strict=True):
            joined[part] = block
        return joined

    def _gathered(self, dq: Sequence[Array], dk: Sequence[Array], dv: Sequence[Array]) -> Gradients:
        return Gradients(self._joined(dq), self._joined(dk), self._joined(dv))


class _Running:
    """The running maximum, sum and weighted values of a block of queries."""

    def __init__(self, rows: int, features: int) -> None:
        self.largest: Array = np.full(rows, -np.inf)
        self.total: Array = np.zeros(rows)
        self.weighted: Array = np.zeros((rows, features))

    def add(self, scores: Array, values: Array) -> None:
        largest = np.maximum(self.largest, scores.max(axis=1))
        shift = np.where(np.isfinite(largest), largest, 0.0)
        old = np.exp(np.where(np.isfinite(self.largest), self.largest - shift, -np.inf))
        new = np.exp(scores - shift[:, None])
        self.total = self.total * old + new.sum(axis=1)
        self.weighted = self.weighted * old[:, None] + new @ values
        self.largest = largest

    def merge(self, other: _Running) -> None:
        largest = np.maximum(self.largest, other.largest)
        shift = np.where(np.isfinite(largest), largest, 0.0)
        mine, theirs = np.exp(self.largest - shift), np.exp(other.largest - shift)
        self.total = self.total * mine + other.total * theirs
        self.weighted = self.weighted * mine[:, None] + other.weighted * theirs[:, None]
        self.largest = largest

    def output(self) -> Array:
        return self.weighted / self.total[:, None]

    def log_sum(self) -> Array:
        return np.asarray(self.largest + np.log(self.total))
