"""Seconds of one operator on one device: a roofline with efficiencies that depend on the operation's size.

    time = launch + max( FLOP / (peak * share_compute(FLOP)),  bytes / (bandwidth * share_memory(bytes)) )

Williams, Waterman and Patterson, CACM 2009, with calculon's idea (Isaev et al., SC 2023) that the reachable share is a
curve over the size of the operation. Curves are piecewise linear in the logarithm of the size and constant outside their
points. Not guaranteed: caches, kernels that run side by side, clocks that fall under load.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np

from stagewright.planner.cost.number import Floats, Number, is_positive, larger
from stagewright.planner.documents.cluster import Device, DType, EfficiencyPoint
from stagewright.planner.errors import InvalidArgument

Engine = Literal["matmul", "batched", "attention", "vector"]

NARROW: tuple[DType, ...] = ("fp8", "fp4", "int8")

_DEFAULT_SHARE = 1.0


@dataclass(frozen=True)
class Curve:
    """A share of a peak rate over the size of the operation, piecewise linear in log(size)."""

    log_size: tuple[float, ...]
    share: tuple[float, ...]

    @classmethod
    def of(cls, points: Sequence[EfficiencyPoint]) -> Curve:
        """Return the curve through `points`; share 1 everywhere when there are none."""
        if not points:
            return cls((0.0,), (_DEFAULT_SHARE,))
        return cls(tuple(math.log(point.size) for point in points), tuple(point.share for point in points))

    @overload
    def __call__(self, size: float) -> float: ...
    @overload
    def __call__(self, size: Floats) -> Floats: ...
    def __call__(self, size: Number) -> Number:
        """Return the share at `size`, which is above 0."""
        if isinstance(size, np.ndarray):
            return np.asarray(np.interp(np.log(size), self.log_size, self.share))
        position = math.log(size)
        logs = self.log_size
        if position <= logs[0]:
            return self.share[0]
        if position >= logs[-1]:
            return self.share[-1]
        after = bisect_right(logs, position)
        left, right = logs[after - 1], logs[after]
        weight = (position - left) / (right - left)
        return self.share[after - 1] * (1 - weight) + self.share[after] * weight


@dataclass(frozen=True)
class Roofline:
    """The rates of one device at one precision.

    Parameters
    ----------
    matmul_flops, attention_flops, vector_flops : peak FLOP per second of products, of attention and of elementwise
        units. Below 16 bits attention stays in bf16, as in Transformer Engine and DeepSeek-V3.
    """

    matmul_flops: float
    attention_flops: float
    vector_flops: float
    bytes_per_s: float
    launch_s: float
    matmul: Curve
    attention: Curve
    memory: Curve

    @classmethod
    def of(cls, device: Device, precision: DType) -> Roofline:
        """Return the roofline of a device; raises InvalidArgument when it has no rate for the precision or a wider one."""
        attention = device.attention_efficiency or device.matmul_efficiency
        return cls(
            matmul_flops=peak_flops(device, precision),
            attention_flops=peak_flops(device, "bf16" if precision in NARROW else precision),
            vector_flops=device.flops.get("fp32", peak_flops(device, precision)),
            bytes_per_s=device.memory_bytes_per_s,
            launch_s=device.launch_s,
            matmul=Curve.of(device.matmul_efficiency),
            attention=Curve.of(attention),
            memory=Curve.of(device.memory_efficiency),
        )

    @overload
    def seconds(self, engine: Engine, flops: float, moved_bytes: float, *, num_groups: int = 1) -> float: ...
    @overload
    def seconds(self, engine: Engine, flops: Number, moved_bytes: Number, *, num_groups: int = 1) -> Number: ...
    def seconds(self, engine: Engine, flops: Number, moved_bytes: Number, *, num_groups: int = 1) -> Number:
        """Return the seconds of `flops` and `moved_bytes` in one kernel; a grouped one is as efficient as one group."""
        computes, moves = is_positive(flops), is_positive(moved_bytes)
        if not computes and not moves:
            return 0.0
        compute_s = flops / self._rate(engine, flops / num_groups) if computes else 0.0
        memory_s = moved_bytes / (self.bytes_per_s * self.memory(moved_bytes)) if moves else 0.0
        return self.launch_s + larger(compute_s, memory_s)

    def peak(self, engine: Engine) -> float:
        """Return the FLOP per second that no kernel of an engine exceeds."""
        if engine == "vector":
            return self.vector_flops
        return self.matmul_flops if engine == "matmul" else self.attention_flops

    def _rate(self, engine: Engine, flops: Number) -> Number:
        if engine == "vector":
            return self.vector_flops
        if engine == "attention":
            return self.attention_flops * self.attention(flops)
        if engine == "batched":
            return self.attention_flops * self.matmul(flops)
        return self.matmul_flops * self.matmul(flops)


_WIDER: dict[DType, tuple[DType, ...]] = {
    "fp8": ("fp8", "bf16", "fp16", "fp32"),
    "fp4": ("fp4", "fp8", "bf16", "fp16", "fp32"),
    "int8": ("int8", "bf16", "fp16", "fp32"),
    "bf16": ("bf16", "fp16", "fp32"),
    "fp16": ("fp16", "bf16", "fp32"),
    "tf32": ("tf32", "fp32"),
    "fp32": ("fp32",),
    "fp64": ("fp64",),
}


def peak_flops(device: Device, precision: DType) -> float:
    """Return the dense matrix-product peak at a precision, or at the narrowest wider one that the device has.

    fp32 training runs its products in full fp32, not in TF32, unless the precision says so; where a device has no bf16
    (V100, T4), 2-byte training runs in fp16.
    """
    for dtype in _WIDER[precision]:
        if dtype in device.flops:
            return device.flops[dtype]
    raise InvalidArgument(
        f"{device.name} has no rate for {precision}, only for {', '.join(sorted(device.flops))}",
        field="precision",
        hint=f"take a job precision among {', '.join(sorted(device.flops))}",
    )
