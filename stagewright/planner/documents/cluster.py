"""Cluster: groups of nodes, their devices, and nested link levels as alpha-beta lines.

Groups may differ in device, memory and links: a mixed cluster is the general case. Within a group, link levels nest:
level k joins `num_devices` devices, innermost first, and the last level joins the whole group.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stagewright.planner.documents.document import Bytes, Count, Document, Name, Part, Rate, Seconds
from stagewright.planner.documents.profile import Source

DType = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp4", "int8"]


class EfficiencyPoint(Part):
    """At operations of this many FLOP (or bytes), this share of the peak rate is reached."""

    size: Rate
    share: Annotated[float, Field(gt=0, le=1.5)]


class Device(Part):
    """One accelerator (or one CPU rank).

    Parameters
    ----------
    memory_bytes : what a training process may use of it, before headroom.
    memory_bytes_per_s : bandwidth of the device memory.
    flops : dense FLOP per second by dtype, without sparsity.
    matmul_efficiency, memory_efficiency : share of the peak reached, by operation size (FLOP, bytes), ascending.
    attention_efficiency : share of the peak reached by fused attention, by FLOP; matmul's when empty.
    launch_s : time of the smallest kernel.
    host_bytes_per_s : bandwidth to host memory and each direction, for offload.
    reserved_bytes : what the driver, the framework and the communication library take before the first tensor.
    reference : where the numbers were published.
    """

    name: Name
    kind: Literal["cuda", "rocm", "tpu", "cpu", "other"] = "cuda"
    memory_bytes: Rate
    memory_bytes_per_s: Rate
    flops: Annotated[dict[DType, Rate], Field(min_length=1)]
    matmul_efficiency: tuple[EfficiencyPoint, ...] = ()
    memory_efficiency: tuple[EfficiencyPoint, ...] = ()
    attention_efficiency: tuple[EfficiencyPoint, ...] = ()
    launch_s: Seconds = 0.0
    host_bytes_per_s: Rate | None = None
    reserved_bytes: Bytes = 0.0
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    source: Source = Source.ANALYTIC
    reference: str = ""


class LinkSegment(Part):
    """From messages of `from_bytes` on, time is latency_s + bytes / bytes_per_s (piecewise alpha-beta)."""

    from_bytes: Bytes
    latency_s: Seconds
    bytes_per_s: Rate


class LinkLevel(Part):
    """A level of the network: how many devices it joins and what a message between two of them costs.

    Parameters
    ----------
    num_devices : devices that one instance of this level joins.
    latency_s, bytes_per_s : alpha and 1/beta, per device and direction.
    segments : measured piecewise lines for point-to-point; they replace the two numbers from their sizes on.
    collectives : measured piecewise lines by collective, on the bytes of the full tensor.
    achieved_share : share of `bytes_per_s` that large messages reach; 1 where the number was measured.
    overlap_slowdown : factor on compute while this level is busy, 1 when none.
    reduces_in_network : switches add up an all-reduce, so each device sends its tensor once.
    processor_latency_s, processor_bytes_per_s : what a message takes of the time of the device at each of its ends, where the
        devices carry their messages themselves, as processors do; without a rate it takes the same whatever its size.
    """

    name: Name
    num_devices: Count
    latency_s: Seconds
    bytes_per_s: Rate
    segments: tuple[LinkSegment, ...] = ()
    collectives: dict[str, tuple[LinkSegment, ...]] = {}
    achieved_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    overlap_slowdown: Annotated[float, Field(ge=1)] = 1.0
    reduces_in_network: bool = False
    processor_latency_s: Seconds = 0.0
    processor_bytes_per_s: Rate | None = None
    source: Source = Source.ANALYTIC


class NodeGroup(Part):
    """Equal nodes of one device kind."""

    name: Name
    device: Device
    num_nodes: Count
    devices_per_node: Count
    links: Annotated[tuple[LinkLevel, ...], Field(min_length=1)]

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = [level.num_devices for level in self.links]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"links: num_devices must grow from level to level, they are {sizes}")
        if sizes[-1] < self.num_devices:
            raise ValueError(
                f"links: the last level joins {sizes[-1]} devices, the group has {self.num_nodes} x "
                f"{self.devices_per_node} = {self.num_devices}"
            )
        return self


class Cluster(Document):
    """Groups of nodes and the link between groups."""

    document_name: ClassVar[str] = "cluster"

    name: Name
    groups: Annotated[tuple[NodeGroup, ...], Field(min_length=1)]
    between_groups: LinkLevel | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.groups) > 1 and self.between_groups is None:
            raise ValueError(f"between_groups is missing, and there are {len(self.groups)} groups")
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise ValueError(f"groups: names must differ, they are {names}")
        return self

    @property
    def num_devices(self) -> int:
        return sum(group.num_devices for group in self.groups)

    @property
    def is_mixed(self) -> bool:
        return len(self.groups) > 1

    def group_of(self, device_index: int) -> NodeGroup:
        """Return the group that holds a device; devices are numbered group by group, node by node."""
        first = 0
        for group in self.groups:
            if device_index < first + group.num_devices:
                return group
            first += group.num_devices
        raise IndexError(f"device {device_index} of {self.num_devices}")
