"""Clusters by catalogue name, by shorthand `DEVICE:PER_NODExNODES`, or from a file.

`a100-sxm-80g:8x128` is 128 nodes of 8. Parts joined by `+` make a mixed cluster, whose groups are joined by the slower of
their networks. A catalogue name takes a number of nodes too: `dgx-h100:16`.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from stagewright.planner.catalog.data_file import read_entries, shortened, suggestion
from stagewright.planner.catalog.devices import DeviceEntry, LinkSpec, device_entries, device_entry
from stagewright.planner.documents.cluster import Cluster, NodeGroup
from stagewright.planner.documents.document import Count, Name, Part
from stagewright.planner.errors import InvalidArgument

MAX_DEVICES = 1_000_000

_SHORTHAND = re.compile(r"(?P<device>[^:]+):(?P<per_node>-?\d+)x(?P<nodes>-?\d+)", re.IGNORECASE)
_SIZED = re.compile(r"(?P<name>[^:]+):(?P<nodes>-?\d+)")


class GroupEntry(Part):
    """Nodes of one device in a catalogue cluster; links default to the device's usual ones."""

    device: Name
    devices_per_node: Count
    node_link: LinkSpec | None = None
    network: LinkSpec | None = None
    price_per_hour: Annotated[float, Field(ge=0)] | None = None


class ClusterEntry(Part):
    """A cluster of the catalogue, with the number of nodes of each group unless told otherwise."""

    name: Name
    reference: str
    nodes: Count
    groups: Annotated[tuple[GroupEntry, ...], Field(min_length=1)]
    between_groups: LinkSpec | None = None
    aliases: tuple[Name, ...] = ()

    def cluster(self, num_nodes: int | None = None) -> Cluster:
        """Return the document with `num_nodes` nodes in each group."""
        nodes = num_nodes or self.nodes
        groups = tuple(
            node_group(
                device_entry(group.device),
                group.devices_per_node,
                nodes,
                node_link=group.node_link,
                network=group.network,
            )
            for group in self.groups
        )
        return _join(self.name if nodes == self.nodes else f"{self.name}:{nodes}", groups, self.between_groups)


@cache
def cluster_entries() -> tuple[ClusterEntry, ...]:
    """Return all clusters of the catalogue."""
    return read_entries("clusters", "clusters", ClusterEntry)


def resolve_cluster(text: str) -> Cluster:
    """Return the cluster that a user's text names; raises InvalidArgument or InvalidDocument with the way out."""
    wanted = text.strip()
    if not wanted:
        raise InvalidArgument("the cluster is empty", field="cluster", hint=_FORMS)
    if _is_path(wanted):
        return Cluster.load(wanted)
    if "+" in wanted:
        return _mixed(wanted)
    shorthand = _SHORTHAND.fullmatch(wanted)
    if shorthand is not None:
        group = _shorthand_group(shorthand)
        return _join(wanted.lower(), (group,), None)
    name, nodes = _sized(wanted)
    for entry in cluster_entries():
        if name == entry.name or name in entry.aliases:
            return entry.cluster(nodes)
    raise _unknown(wanted, name)


def node_group(
    entry: DeviceEntry,
    devices_per_node: int,
    num_nodes: int,
    *,
    name: str | None = None,
    node_link: LinkSpec | None = None,
    network: LinkSpec | None = None,
) -> NodeGroup:
    """Return equal nodes of a device: one link level inside a node, one between nodes."""
    total = devices_per_node * num_nodes
    levels = []
    if devices_per_node > 1 or num_nodes == 1:
        levels.append((node_link or entry.node_link).level(devices_per_node))
    if num_nodes > 1:
        levels.append((network or entry.network).level(total))
    return NodeGroup(
        name=name or entry.name,
        device=entry.device,
        num_nodes=num_nodes,
        devices_per_node=devices_per_node,
        links=tuple(levels),
    )


_FORMS = (
    "give DEVICE:PER_NODExNODES such as a100-sxm-80g:8x16, a catalogue name such as dgx-h100, or the path of a file"
)


def _is_path(text: str) -> bool:
    return text.endswith((".json", ".yaml", ".yml")) or "/" in text or Path(text).is_file()


def _mixed(text: str) -> Cluster:
    entries: list[tuple[NodeGroup, LinkSpec]] = []
    for part in text.split("+"):
        match = _SHORTHAND.fullmatch(part.strip())
        if match is None:
            raise InvalidArgument(
                f"{part.strip()!r} in {text!r} is not DEVICE:PER_NODExNODES", field="cluster", hint=_FORMS
            )
        group = _shorthand_group(match)
        used = [other.name for other, _ in entries]
        if group.name in used:
            number = 2 + sum(1 for name in used if name.startswith(f"{group.name}-"))
            group = group.model_copy(update={"name": f"{group.name}-{number}"})
        entries.append((group, device_entry(match["device"]).network))
    if len(entries) == 1:
        return _join(text.lower(), (entries[0][0],), None)
    slower = min((network for _, network in entries), key=lambda link: link.bytes_per_s * link.achieved_share)
    return _join(text.lower(), tuple(group for group, _ in entries), slower)


def _shorthand_group(match: re.Match[str]) -> NodeGroup:
    entry = device_entry(match["device"])
    per_node, nodes = int(match["per_node"]), int(match["nodes"])
    text = match.group(0)
    for name, value in (("devices per node", per_node), ("nodes", nodes)):
        if value < 1:
            raise InvalidArgument(f"{text!r} has {value} {name}, it must be at least 1", field="cluster", hint=_FORMS)
    if per_node * nodes > MAX_DEVICES:
        raise InvalidArgument(
            f"{text!r} has {per_node * nodes} devices, at most {MAX_DEVICES} are supported", field="cluster"
        )
    return node_group(entry, per_node, nodes)


def _sized(text: str) -> tuple[str, int | None]:
    match = _SIZED.fullmatch(text)
    if match is None:
        return text.lower(), None
    nodes = int(match["nodes"])
    if not 1 <= nodes <= MAX_DEVICES:
        raise InvalidArgument(f"{text!r} has {nodes} nodes, it must be at least 1", field="cluster", hint=_FORMS)
    return match["name"].lower(), nodes


def _join(name: str, groups: tuple[NodeGroup, ...], between: LinkSpec | None) -> Cluster:
    total = sum(group.num_devices for group in groups)
    return Cluster(
        name=name, groups=groups, between_groups=between.level(total) if between and len(groups) > 1 else None
    )


def _unknown(text: str, name: str) -> InvalidArgument:
    clusters = [entry.name for entry in cluster_entries()]
    devices = [entry.name for entry in device_entries()]
    if name in devices or any(name in entry.aliases for entry in device_entries()):
        return InvalidArgument(
            f"{text!r} is a device, a cluster needs its size", field="cluster", hint=f"give {name}:8x4 for 4 nodes of 8"
        )
    return InvalidArgument(
        f"there is no cluster {text!r}",
        field="cluster",
        hint=suggestion(name, [*clusters, *devices]) + f"{_FORMS}; known clusters: {shortened(clusters)}",
    )
