"""What must move between devices when a job goes from one plan to another.

Every device's needed intervals (`state_layout`) are compared with what it holds; the rest comes from a surviving holder,
in the same node where there is one, else spread over the holders. What no survivor holds must be restored.
Time: each device sends and receives its messages one after the other, both ways at once, each at the bandwidth of its link.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.migration import Migration, Move
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.search.pipeline_costs import line_at, slowest_link
from stagewright.planner.state_layout import Piece, state_pieces

_DUST = 1e-12

Key = tuple[int, str, str]


@dataclass
class _Holders:
    """Disjoint intervals of one kind and item, ascending, and the surviving devices that hold each."""

    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    devices: list[list[int]] = field(default_factory=list)

    def at(self, position: float) -> int:
        """Return the interval that holds a position."""
        return max(0, bisect_right(self.starts, position + _DUST) - 1)


def migration(previous: Plan, plan: Plan, profile: ModelProfile, survivors: Sequence[int] | None = None) -> Migration:
    """Return what moves where.

    Parameters
    ----------
    survivors : device of the previous plan on which each device of the new plan runs; the first ones in order when
        None. Devices beyond them are new and hold nothing.
    """
    if survivors is None:
        survivors = range(min(plan.num_devices, previous.num_devices))
    now = {old: new for new, old in enumerate(survivors)}
    holders = _holders(previous, profile, now)
    kept = moved = restored = 0.0
    sizes: dict[tuple[int, int | None, int], float] = defaultdict(float)
    for device, piece in _distinct(plan, profile):
        for source, size in _sources(holders.get((piece.layer, piece.kind, piece.item)), piece, device, plan.cluster):
            if source == device:
                kept += size
                continue
            sizes[piece.layer, source, device] += size
            if source is None:
                restored += size
            else:
                moved += size
    names = profile.layer_names
    moves = tuple(
        Move(layer=names[layer], source=source, target=target, bytes=size)
        for (layer, source, target), size in sorted(
            sizes.items(), key=lambda item: (item[0][0], item[0][2], -1 if item[0][1] is None else item[0][1])
        )
    )
    return Migration(
        kept_bytes=kept,
        moved_bytes=moved,
        restored_bytes=restored,
        seconds=_seconds(moves, plan.cluster),
        previous_step_time_s=previous.prediction.step_time_s,
        moves=moves,
    )


def _distinct(plan: Plan, profile: ModelProfile) -> Iterator[tuple[int, Piece]]:
    """Yield each piece of a device once, also where two replicas of a stage run on it."""
    seen: set[tuple[int, Piece]] = set()
    for device, piece in state_pieces(plan, profile):
        if (device, piece) not in seen:
            seen.add((device, piece))
            yield device, piece


def _holders(previous: Plan, profile: ModelProfile, now: dict[int, int]) -> dict[Key, _Holders]:
    spans: dict[Key, dict[tuple[float, float], list[int]]] = defaultdict(lambda: defaultdict(list))
    for device, piece in state_pieces(previous, profile):
        devices = spans[piece.layer, piece.kind, piece.item][piece.start, piece.end]
        if device in now and now[device] not in devices:
            devices.append(now[device])
    found = {}
    for key, intervals in spans.items():
        order = sorted(intervals)
        found[key] = _Holders(
            [start for start, _ in order], [end for _, end in order], [sorted(intervals[span]) for span in order]
        )
    return found


def _sources(
    holders: _Holders | None, piece: Piece, device: int, cluster: Cluster
) -> Iterator[tuple[int | None, float]]:
    """Yield (source, bytes) for the parts of a needed piece; the device itself where it holds them."""
    position = piece.start
    while position < piece.end - _DUST:
        if holders is None:
            yield None, (piece.end - position) * piece.whole_bytes
            return
        index = holders.at(position)
        end = min(piece.end, holders.ends[index])
        yield _nearest(holders.devices[index], device, cluster), (end - position) * piece.whole_bytes
        position = end


def _nearest(devices: Sequence[int], device: int, cluster: Cluster) -> int | None:
    """Return the device itself, one of its node, or any, spread by number; None without one."""
    if not devices:
        return None
    if device in devices:
        return device
    node = _node(device, cluster)
    near = [other for other in devices if _node(other, cluster) == node]
    chosen = near or devices
    return chosen[device % len(chosen)]


def _node(device: int, cluster: Cluster) -> tuple[str, int]:
    group = cluster.group_of(device)
    return group.name, device // group.devices_per_node


def _seconds(moves: Sequence[Move], cluster: Cluster) -> float:
    sent: dict[int, float] = defaultdict(float)
    received: dict[int, float] = defaultdict(float)
    rates: dict[tuple[int, int], float] = {}
    for move in moves:
        if move.source is None:
            continue
        pair = (move.source, move.target)
        if pair not in rates:
            link = slowest_link(np.array([move.source]), np.array([move.target]), cluster)
            rates[pair] = line_at(link, move.bytes).bytes_per_s
        seconds = move.bytes / rates[pair]
        sent[move.source] += seconds
        received[move.target] += seconds
    return max([*sent.values(), *received.values()], default=0.0)
