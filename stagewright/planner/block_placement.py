"""Where the blocks of attention run when sequences are cut into blocks (DCP, Jiang et al., SOSP 2025).

A sequence of n blocks has data blocks (queries with their output, keys with values) and, under a causal mask, computing blocks
(i, j), j <= i. A computing block runs on one device, which needs query block i and key-value block j; the output's partial sums
of i go back to where i lives. That is a hypergraph: computing blocks are vertices with work w_ij (1, or 1/2 on the diagonal), a
data block is a net over the computing blocks that use it, and with its own device h(k)

    volume = sum over data blocks k of  bytes_k  |{devices that use k} - {h(k)}|
    s.t.     work of each device <= max( (1 + tolerance) total / N,  total / N + (1 - 1/N) largest block )

where the second limit is what list scheduling always reaches. `place_blocks` puts whole sequences on a device where they
fit, lays the blocks of longer ones out in bands of equal work (by queries, and by keys) over the devices with most room,
moves and swaps single blocks while the volume falls and the balance holds, and takes the better of its starts. No optimum
is proved; `least_volume_bytes` enumerates small cases. `ring_volume` is what a ring over all devices sends: every key-value
block to all the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidArgument

MOST_SWAPPED = 40

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BlockSizes:
    """Bytes of one block: its queries and output (forward and back), its keys and values."""

    query_bytes: float
    key_value_bytes: float

    @classmethod
    def of(cls, profile: ModelProfile, block: int) -> BlockSizes:
        """Return the bytes of `block` tokens in one attention layer, 2 bytes a number: q and o as wide as the heads together.

        Raises InvalidArgument for a model without attention heads.
        """
        shape = profile.architecture
        if shape is None or not shape.num_heads:
            raise InvalidArgument(f"{profile.name} has no attention heads", field="model")
        size = shape.head_size or shape.hidden_size // shape.num_heads
        pairs = (shape.num_kv_heads or shape.num_heads) * size
        return cls(2.0 * block * 2 * shape.num_heads * size, 2.0 * block * 2 * pairs)


@dataclass(frozen=True, eq=False)
class Blocks:
    """All blocks of some sequences.

    Parameters
    ----------
    sequence : of each data block, int64 [n].
    query, key : data blocks of each computing block, int64 [m].
    work : of each computing block, in whole blocks, [m].
    """

    sequence: Longs
    query: Longs
    key: Longs
    work: Floats

    @classmethod
    def causal(cls, lengths: Sequence[int], block: int) -> Blocks:
        """Return the blocks of causal sequences, the last block of each maybe not full."""
        sequence: list[int] = []
        query: list[int] = []
        key: list[int] = []
        for index, length in enumerate(lengths):
            count, first = -(-length // block), len(sequence)
            sequence += [index] * count
            for i in range(count):
                query += [first + i] * (i + 1)
                key += list(range(first, first + i + 1))
        pairs = np.array(query, dtype=np.int64), np.array(key, dtype=np.int64)
        return cls(np.array(sequence, dtype=np.int64), *pairs, np.where(pairs[0] == pairs[1], 0.5, 1.0))


@dataclass(frozen=True, eq=False)
class Placement:
    """The device of each data block [n] and of each computing block [m]."""

    home: Longs
    device: Longs


def volume_bytes(blocks: Blocks, placed: Placement, sizes: BlockSizes) -> float:
    """Return the bytes that all devices receive, each block once a device that needs it and does not own it."""
    total = 0.0
    for data, size in ((blocks.query, sizes.query_bytes), (blocks.key, sizes.key_value_bytes)):
        pairs = np.unique(np.stack((data, placed.device)), axis=1)
        total += size * float((placed.home[pairs[0]] != pairs[1]).sum())
    return total


def ring_volume_bytes(blocks: Blocks, num_devices: int, sizes: BlockSizes) -> float:
    """Return what context parallelism over all devices sends: every key-value block visits all the other devices."""
    return len(blocks.sequence) * sizes.key_value_bytes * (num_devices - 1)


def loads_of(blocks: Blocks, placed: Placement, num_devices: int) -> Floats:
    """Return the work of each device, [N]."""
    return np.asarray(np.bincount(placed.device, weights=blocks.work, minlength=num_devices), dtype=np.float64)


def work_limit(blocks: Blocks, num_devices: int, tolerance: float) -> float:
    """Return the most work that a device may have."""
    even, largest = float(blocks.work.sum()) / num_devices, float(blocks.work.max(initial=0.0))
    return max((1.0 + tolerance) * even, even + (1.0 - 1.0 / num_devices) * largest) + 1e-9


def place_blocks(blocks: Blocks, num_devices: int, sizes: BlockSizes, *, tolerance: float = 0.1) -> Placement:
    """Return a placement of low volume whose loads are within `work_limit`; deterministic."""
    limit = work_limit(blocks, num_devices, tolerance)
    found = []
    for order in (np.lexsort((blocks.key, blocks.query)), np.lexsort((blocks.query, blocks.key))):
        placed = _in_bands(blocks, order, num_devices, sizes, limit)
        found.append(_improved(blocks, placed, num_devices, sizes, limit))
    return min(found, key=lambda placed: volume_bytes(blocks, placed, sizes))


def _in_bands(blocks: Blocks, rank: Longs, num_devices: int, sizes: BlockSizes, limit: float) -> Placement:
    """Return the placement of whole sequences on one device and of longer ones in bands, blocks in the order of `rank`."""
    loads = np.zeros(num_devices)
    home = np.zeros(len(blocks.sequence), dtype=np.int64)
    device = np.zeros(len(blocks.work), dtype=np.int64)
    of_sequence = blocks.sequence[blocks.query]
    totals = np.bincount(of_sequence, weights=blocks.work)
    for sequence in np.argsort(-totals, kind="stable").tolist():
        own = rank[of_sequence[rank] == sequence]
        data = np.flatnonzero(blocks.sequence == sequence)
        lightest = int(np.argmin(loads))
        if loads[lightest] + totals[sequence] <= limit:
            device[own], home[data] = lightest, lightest
            loads[lightest] += totals[sequence]
            continue
        # Each device is filled up to the limit before the next one, so a band keeps its queries (or keys) together.
        order = sorted(range(num_devices), key=lambda at: (loads[at], at))
        place = 0
        for block in own.tolist():
            while place < num_devices - 1 and loads[order[place]] + blocks.work[block] > limit:
                place += 1
            device[block] = order[place]
            loads[order[place]] += blocks.work[block]
    return Placement(_homes(blocks, device, home, sizes), device)


def _homes(blocks: Blocks, device: Longs, home: Longs, sizes: BlockSizes) -> Longs:
    """Return for each data block the device that saves most bytes by owning it."""
    found = home.copy()
    for block in range(len(home)):
        gain: dict[int, float] = {}
        for at in np.unique(device[blocks.query == block]).tolist():
            gain[at] = gain.get(at, 0.0) + sizes.query_bytes
        for at in np.unique(device[blocks.key == block]).tolist():
            gain[at] = gain.get(at, 0.0) + sizes.key_value_bytes
        found[block] = max(sorted(gain), key=lambda at: gain[at])
    return found


def _improved(
    blocks: Blocks, placed: Placement, num_devices: int, sizes: BlockSizes, limit: float, *, rounds: int = 4
) -> Placement:
    """Return the placement after moves and swaps of single computing blocks that lower the volume within the limit."""
    device, home = placed.device.copy(), placed.home
    loads = loads_of(blocks, placed, num_devices)
    for _ in range(rounds):
        uses = _uses(blocks, device, num_devices)
        moved = False
        for block in range(len(device)):
            here = int(device[block])
            gains = _gains(blocks, block, here, uses, home, sizes)
            gains[loads + blocks.work[block] > limit] = -np.inf
            gains[here] = 0.0
            there = int(np.argmax(gains))
            if gains[there] > 1e-9:
                for table, data in zip(uses, (blocks.query[block], blocks.key[block]), strict=True):
                    table[data, here] -= 1
                    table[data, there] += 1
                loads[here] -= blocks.work[block]
                loads[there] += blocks.work[block]
                device[block], moved = there, True
        home = _homes(blocks, device, home, sizes)
        moved = _swapped(blocks, device, loads, home, sizes, limit) or moved
        home = _homes(blocks, device, home, sizes)
        if not moved:
            break
    return Placement(home, device)


def _swapped(blocks: Blocks, device: Longs, loads: Floats, home: Longs, sizes: BlockSizes, limit: float) -> bool:
    """Swap the devices of two computing blocks in place where that lowers the volume; tell whether any did.

    For up to MOST_SWAPPED blocks, whose pairs are few.
    """
    if len(device) > MOST_SWAPPED:
        return False
    best, changed = volume_bytes(blocks, Placement(home, device), sizes), False
    for first in range(len(device)):
        for second in range(first + 1, len(device)):
            here, there = int(device[first]), int(device[second])
            more = blocks.work[second] - blocks.work[first]
            if here == there or loads[here] + more > limit or loads[there] - more > limit:
                continue
            device[first], device[second] = there, here
            value = volume_bytes(blocks, Placement(_homes(blocks, device, home, sizes), device), sizes)
            if value < best - 1e-9:
                best, changed = value, True
                loads[here] += more
                loads[there] -= more
            else:
                device[first], device[second] = here, there
    return changed


def _uses(blocks: Blocks, device: Longs, num_devices: int) -> tuple[Longs, Longs]:
    """Return how many computing blocks on each device use each query and each key-value block, two of [n, N]."""
    tables = np.zeros((2, len(blocks.sequence), num_devices), dtype=np.int64)
    np.add.at(tables[0], (blocks.query, device), 1)
    np.add.at(tables[1], (blocks.key, device), 1)
    return tables[0], tables[1]


def _gains(blocks: Blocks, block: int, here: int, uses: tuple[Longs, Longs], home: Longs, sizes: BlockSizes) -> Floats:
    """Return the bytes saved by moving one computing block to each device, [N]."""
    gains = np.zeros(uses[0].shape[1])
    each = (blocks.query[block], sizes.query_bytes), (blocks.key[block], sizes.key_value_bytes)
    for table, (data, size) in zip(uses, each, strict=True):
        if table[data, here] == 1 and home[data] != here:
            gains += size
        news = table[data] == 0
        news[home[data]] = False
        gains -= size * news
    return gains


def least_volume_bytes(blocks: Blocks, num_devices: int, sizes: BlockSizes, *, tolerance: float = 0.1) -> float:
    """Return the least volume over every placement of the computing blocks; for a dozen of them at most."""
    limit = work_limit(blocks, num_devices, tolerance)
    best = float("inf")
    empty = np.zeros(len(blocks.sequence), dtype=np.int64)
    for choice in product(range(num_devices), repeat=len(blocks.work)):
        device = np.array(choice, dtype=np.int64)
        if np.bincount(device, weights=blocks.work, minlength=num_devices).max() > limit:
            continue
        placed = Placement(_homes(blocks, device, empty, sizes), device)
        best = min(best, volume_bytes(blocks, placed, sizes))
    return best
