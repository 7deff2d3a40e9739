"""A mixture of experts on emulated devices: tokens sent to experts, experts sent to tokens, a hot expert shadowed.

Each device holds some tokens and its own experts, relu(x U) V each; a token's output is the sum over its experts, weighted by
the router. Three ways give the same outputs and the same gradients of the experts:

    tokens travel    counts are exchanged first, then rows of uneven number, and back (GShard, FastMoE's all-to-all-v);
                     experts compute one after the other with no capacity and no padding (MegaBlocks' dropless)
    experts travel   weights are fetched by the devices that need them, gradients return (Janus)
    shadowing        hot experts are copied to everyone and their gradients summed, other tokens travel (FasterMoE)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.emulation.wire import Array, Wire

Routes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MixtureResult:
    """Outputs of all tokens, gradients of U and V of every expert, and what each device received."""

    output: Array
    up_gradient: Array
    down_gradient: Array
    wire: Wire


class Mixture:
    """Tokens [n, h] dealt out over devices in order, experts [E] dealt out in blocks.

    Parameters
    ----------
    up, down : weights of the experts, [E, h, f] and [E, f, h].
    routes, weights : the experts of each token and their weights, [n, k].
    """

    def __init__(self, tokens: Array, up: Array, down: Array, routes: Routes, weights: Array, num_devices: int) -> None:
        self.tokens, self.up, self.down = tokens, up, down
        self.routes, self.weights = routes, weights
        self.num_devices = num_devices

    def token_device(self, token: int) -> int:
        """Return the device that holds a token."""
        return token * self.num_devices // len(self.tokens)

    def expert_device(self, expert: int) -> int:
        """Return the device that holds an expert."""
        return expert * self.num_devices // len(self.up)

    def reference(self, output_gradient: Array) -> MixtureResult:
        """Return outputs and gradients on one device."""
        return self._run(output_gradient, range(len(self.up)), Wire(self.num_devices), count=False)

    def tokens_travel(self, output_gradient: Array, *, shadowed: Collection[int] = ()) -> MixtureResult:
        """Return the same with tokens sent to their experts; `shadowed` experts are copied to every device instead."""
        wire = Wire(self.num_devices)
        self._exchange_counts(wire)
        for expert in shadowed:
            self._copy_expert(expert, range(self.num_devices), wire)
        return self._run(output_gradient, [e for e in range(len(self.up)) if e not in shadowed], wire, count=True)

    def experts_travel(self, output_gradient: Array) -> MixtureResult:
        """Return the same with experts fetched by the devices whose tokens need them."""
        wire = Wire(self.num_devices)
        for expert in range(len(self.up)):
            users = sorted({self.token_device(token) for token, _ in self._rows_of(expert)})
            self._copy_expert(expert, users, wire)
        return self._run(output_gradient, (), wire, count=True)

    def _exchange_counts(self, wire: Wire) -> None:
        """Tell every device how many rows each other one will send: one number an expert."""
        each = len(self.up) // self.num_devices
        for source in range(self.num_devices):
            for target in range(self.num_devices):
                wire.send(np.zeros(each), source, target)

    def _copy_expert(self, expert: int, users: Sequence[int], wire: Wire) -> None:
        home = self.expert_device(expert)
        for user in users:
            for block in (self.up[expert], self.down[expert]):
                wire.send(block, home, user)
                wire.send(block, user, home)

    def _rows_of(self, expert: int) -> list[tuple[int, int]]:
        found = np.argwhere(self.routes == expert)
        return [(int(token), int(slot)) for token, slot in found]

    def _run(self, output_gradient: Array, travelling: Collection[int], wire: Wire, *, count: bool) -> MixtureResult:
        """Compute expert by expert; rows of `travelling` experts go to the expert's device and back, each way."""
        output = np.zeros_like(self.tokens)
        up_gradient, down_gradient = np.zeros_like(self.up), np.zeros_like(self.down)
        for expert in range(len(self.up)):
            rows = self._rows_of(expert)
            if not rows:
                continue
            which = [token for token, _ in rows]
            weight = np.array([self.weights[token, slot] for token, slot in rows])[:, None]
            inputs, gradient = self.tokens[which], output_gradient[which] * weight
            if count and expert in travelling:
                home = self.expert_device(expert)
                for token in which:
                    here = self.token_device(token)
                    for _ in ("forward", "backward"):
                        wire.send(self.tokens[token], here, home)
                        wire.send(self.tokens[token], home, here)
            inner = inputs @ self.up[expert]
            active = np.maximum(inner, 0.0)
            np.add.at(output, which, weight * (active @ self.down[expert]))
            down_gradient[expert] = active.T @ gradient
            up_gradient[expert] = inputs.T @ ((gradient @ self.down[expert].T) * (inner > 0))
        return MixtureResult(output, up_gradient, down_gradient, wire)
