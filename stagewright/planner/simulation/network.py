"""What the simulator is told beyond an order and its costs: links, collectives, memory, and how a cost divides.

All four are frozen; a scalar stands for the same value everywhere. Without them messages are free, there are no
collectives, memory is activations only, and slices are equal shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Links:
    """Point-to-point links between ranks: a message of n bytes takes latency + n / bandwidth.

    A directed pair of ranks carries one message at a time, in the order in which they were issued; only the n /
    bandwidth part occupies it. Infinite bandwidth, the default, is the latency-only model: links are then unlimited.

    Parameters
    ----------
    latency_s : one value, or [num_ranks, num_ranks] from row to column.
    bytes_per_s : one value, or [num_ranks, num_ranks].
    boundary_bytes : activation of a microbatch on each edge of the stage graph, one value or [num_edges].
    gradient_bytes : the same for the way back; as `boundary_bytes` when None.
    overlap : sends run beside compute; otherwise the sender computes nothing until its message has arrived.
    peer_bytes_per_s, peer_latency_s : link that carries EVICT and LOAD, one lane for each direction of each rank.
    peer : int32 [num_ranks], rank that accepts a rank's evicted activations; rank D - 1 - r when None.
    host_bytes_per_s, host_latency_s : link that carries OFFLOAD and RELOAD, one lane for each direction of each rank.
    """

    latency_s: float | Floats = 0.0
    bytes_per_s: float | Floats = math.inf
    boundary_bytes: float | Floats = 0.0
    gradient_bytes: float | Floats | None = None
    overlap: bool = True
    peer_bytes_per_s: float = math.inf
    peer_latency_s: float = 0.0
    peer: Ints | None = None
    host_bytes_per_s: float = math.inf
    host_latency_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("latency_s", "boundary_bytes", "peer_latency_s", "host_latency_s"):
            _require(name, getattr(self, name), positive=False)
        if self.gradient_bytes is not None:
            _require("gradient_bytes", self.gradient_bytes, positive=False)
        for name in ("bytes_per_s", "peer_bytes_per_s", "host_bytes_per_s"):
            _require(name, getattr(self, name), positive=True)


@dataclass(frozen=True, eq=False)
class Collectives:
    """Seconds of the collective and optimizer actions that a lowered schedule holds, per stage.

    Parameters
    ----------
    reduce_grad_s, unshard_s, optimizer_s : one value or [num_stages].
    overlap : collectives run on a lane of their own beside compute; otherwise the rank computes nothing meanwhile.
    """

    reduce_grad_s: float | Floats = 0.0
    unshard_s: float | Floats = 0.0
    optimizer_s: float | Floats = 0.0
    overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("reduce_grad_s", "unshard_s", "optimizer_s"):
            _require(name, getattr(self, name), positive=False)


@dataclass(frozen=True, eq=False)
class Memory:
    """What a rank holds beside activations, in the unit of `StageCosts.activation`.

    Parameters
    ----------
    static_bytes : whatever else is there all the time, one value or [num_ranks].
    weight_bytes : one version of a stage's weights, one value or [num_stages]; the schedule's policy says how many.
    gradient_bytes, optimizer_bytes : one value or [num_stages].
    recomputed_bytes : held from the start of R (or of the backward) to the end of B or W, one value or [num_stages].
    gathered_bytes : held from the start of UNSHARD to RESHARD, one value or [num_stages].
    receive_buffers : count a message's bytes on the receiver from its arrival to the end of the action that uses it.
    """

    static_bytes: float | Floats = 0.0
    weight_bytes: float | Floats = 0.0
    gradient_bytes: float | Floats = 0.0
    optimizer_bytes: float | Floats = 0.0
    recomputed_bytes: float | Floats = 0.0
    gathered_bytes: float | Floats = 0.0
    receive_buffers: bool = False

    def __post_init__(self) -> None:
        for name in ("static_bytes", "weight_bytes", "gradient_bytes", "optimizer_bytes", "recomputed_bytes"):
            _require(name, getattr(self, name), positive=False)
        _require("gathered_bytes", self.gathered_bytes, positive=False)


@dataclass(frozen=True, eq=False)
class Shares:
    """How the cost of a whole microbatch divides over slices, differs between microbatches, and overlaps.

    Parameters
    ----------
    slice_time, slice_activation : share of a microbatch, [num_slices]; equal shares when None.
    microbatch_time, microbatch_activation : factor for each microbatch, [num_microbatches]; 1 when None.
    overlap_s : seconds of a fused pair, [num_stages, num_stages], by (stage of its F, stage of its backward); the sum
        of the two when None.
    fill_s : seconds of FILL actions, [num_items], by their microbatch column.
    row_factor, row_extra_s : what the seconds of each compute action are multiplied with, and what is added to them then,
        [num_rows] over all ranks behind each other.
    """

    slice_time: Floats | None = None
    slice_activation: Floats | None = None
    microbatch_time: Floats | None = None
    microbatch_activation: Floats | None = None
    overlap_s: Floats | None = None
    fill_s: Floats | None = None
    row_factor: Floats | None = None
    row_extra_s: Floats | None = None

    @property
    def has_rows(self) -> bool:
        """Whether single actions have seconds of their own."""
        return self.row_factor is not None or self.row_extra_s is not None

    def __post_init__(self) -> None:
        for name in (
            "slice_time",
            "slice_activation",
            "microbatch_time",
            "microbatch_activation",
            "overlap_s",
            "fill_s",
            "row_factor",
            "row_extra_s",
        ):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), positive=False)


def spread(name: str, value: float | Floats, shape: tuple[int, ...]) -> Floats:
    """Return `value` as a new float64 array of `shape`; raises InvalidArgument when it has another shape."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim and array.shape != shape:
        raise InvalidArgument(f"{name} has shape {array.shape}, the schedule needs {shape}", field=name)
    return np.ascontiguousarray(np.broadcast_to(array, shape)).copy()


def _require(name: str, value: float | Floats, *, positive: bool) -> None:
    array = np.asarray(value, dtype=np.float64)
    bad = np.isnan(array) | ((array <= 0) if positive else ((array < 0) | np.isinf(array)))
    if bad.any():
        found = float(array[bad].flat[0])
        rule = "above 0" if positive else "finite and at least 0"
        raise InvalidArgument(f"{name} is {found:g}, it must be {rule}", field=name)
