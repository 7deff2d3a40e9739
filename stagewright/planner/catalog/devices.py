"""The devices of the catalogue: dense rates by dtype, memory, efficiency curves, the links they usually come with.

Every rate is dense: figures that vendors print with structured sparsity are halved. `memory_bytes` is what the driver
reports, not what the box says. Efficiency curves of the A100 are fitted on published runs (benchmarks/published.py);
the others' are set from published kernel benchmarks and are analytic until someone measures. Large messages reach 54 %
of a 200 Gb/s card: Narayanan et al. 2021 (section 5.9) saw about half in all-reduces of 3,072 devices, and the fit agrees.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated

from pydantic import Field

from stagewright.planner.catalog.data_file import read_entries, shortened, suggestion
from stagewright.planner.documents.cluster import Device, LinkLevel
from stagewright.planner.documents.document import Count, Name, Part, Rate, Seconds
from stagewright.planner.errors import InvalidArgument


class LinkSpec(Part):
    """A link without the number of devices it joins."""

    name: Name
    bytes_per_s: Rate
    latency_s: Seconds
    achieved_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    reduces_in_network: bool = False

    def level(self, num_devices: int) -> LinkLevel:
        """Return the link as a level that joins `num_devices`."""
        return LinkLevel(num_devices=num_devices, **self.model_dump())


class DeviceEntry(Part):
    """A device with the node and the network it usually stands in."""

    device: Device
    aliases: tuple[Name, ...] = ()
    devices_per_node: Count
    node_link: LinkSpec
    network: LinkSpec
    note: str = ""

    @property
    def name(self) -> str:
        return self.device.name


@cache
def device_entries() -> tuple[DeviceEntry, ...]:
    """Return all devices of the catalogue."""
    return read_entries("devices", "devices", DeviceEntry)


def device_entry(name: str) -> DeviceEntry:
    """Return a device by name or alias, in any case; raises InvalidArgument with the nearest name."""
    wanted = name.strip().lower()
    for entry in device_entries():
        if wanted == entry.name or wanted in entry.aliases:
            return entry
    names = [entry.name for entry in device_entries()]
    known = names + [alias for entry in device_entries() for alias in entry.aliases]
    raise InvalidArgument(
        f"there is no device {name!r} in the catalogue",
        field="cluster",
        hint=suggestion(wanted, known) + f"known: {shortened(names)}; `stagewright catalog gpus` lists all",
    )
