"""Several rings at once on a fully connected group (TASP), and the tree that decodes with attention (tree attention).

The complete graph on n devices falls into (n - 1) / 2 Hamiltonian cycles when n is odd, and into (n - 2) / 2 and a matching when n is even
(Walecki, 1890s): a zig-zag 0, 1, n', 2, n' - 1, ... over a circle of the other devices, closed through a hub, and turned. Run in both
directions, R such cycles carry R different parts of every block and share no directed link, so ring attention takes

    (n - 1) (latency + block / (R * bandwidth))        instead of (n - 1) (latency + block / bandwidth)

where every pair has a link of its own. Tree attention reduces partial results (numerator, denominator, maximum) instead of
passing keys and values: 2 ceil(log2 n) messages of b h + 2 b a elements, whatever the sequence.

Papers: Wang et al., TASP: Topology-aware Sequence Parallelism, 2025; Shyam et al., Tree Attention, 2024.
"""

from __future__ import annotations

from math import ceil, log2

from stagewright.planner.errors import InvalidArgument

Ring = tuple[int, ...]


def disjoint_rings(num_devices: int) -> tuple[Ring, ...]:
    """Return directed Hamiltonian cycles of the complete graph that share no directed link, as many as Walecki's gives.

    n - 1 for odd n, n - 2 for even n; the one cycle of two devices is both directions of their link.
    """
    if num_devices < 2:
        raise InvalidArgument(f"a ring needs at least 2 devices, {num_devices} were given", field="num_devices")
    if num_devices == 2:
        return ((0, 1),)
    circle = num_devices - 1
    zigzag = [0]
    for step in range(1, circle // 2 + 1):
        zigzag += [step, circle - step]
    cycles = [
        (*((place + start) % circle for place in zigzag[:circle]), circle)  # the last device is the hub
        for start in range(circle // 2)
    ]
    return tuple(ring for cycle in cycles for ring in (cycle, cycle[::-1]))


def multi_ring_s(
    block_bytes: float, num_devices: int, *, latency_s: float, bytes_per_s: float, rings: int = 1
) -> float:
    """Return the seconds in which every block visits every device over `rings` disjoint rings."""
    most = len(disjoint_rings(num_devices)) if num_devices > 1 else 1
    if not 1 <= rings <= most:
        raise InvalidArgument(
            f"{num_devices} devices have {most} disjoint rings, {rings} were asked for", field="rings"
        )
    return (num_devices - 1) * (latency_s + block_bytes / (rings * bytes_per_s))


def tree_decode_elements(batch: int, hidden: int, heads: int, num_devices: int) -> float:
    """Return the elements a device sends to merge one token's attention over a sequence split on the devices."""
    if num_devices < 1:
        raise InvalidArgument(f"num_devices is {num_devices}, there is at least 1", field="num_devices")
    return 2.0 * ceil(log2(num_devices)) * (batch * hidden + 2 * batch * heads) if num_devices > 1 else 0.0
