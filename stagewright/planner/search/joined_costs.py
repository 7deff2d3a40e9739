"""What a stage costs whose replicas stand on several node groups and take uneven shares of each microbatch.

A stage ends a microbatch when its slowest replica does, so a layer takes the longest of its replicas; its seconds once a
step are those of one reduction over all replicas. With part g of n_g replicas and s_g samples each,

    F_l = max_g F_l(g, s_g),  ...          sum_g n_g s_g = M

which is exact where one part is slowest in every layer, and else above the truth: a sum of maxima over the layers is at least
the maximum of the sums. Bytes are those of one part (`told`), or with room_g bytes free on a device of part g

    b_l = max_g b_l(g, s_g) min_h room_h / room_g

against min room: whoever fits so fits on every part.

States that ZeRO divides are held in equal shares, or in proportion to the room of the devices; what is gathered and scattered
then takes as long as shards of the largest size would. Shares follow Metis' data balance (Um et al., USENIX ATC 2024): in proportion to the peak rates, rounded. Of the vectors
with each s_g at most one away from its proportion, the `MOST_SHARES` whose slowest replica has least to do are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import ceil, floor
from typing import TypeVar

import numpy as np

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.joined_replicas import JoinedReplicas, joined_replicas
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.replica_shares import ReplicaPart
from stagewright.planner.search.layer_costs import Configuration, LayerCosts, layer_costs
from stagewright.planner.search.pricing import Priced

MOST_SHARES = 2
# Of the fullest device; all other costs are of the slowest one, but what is alike or only reported.
_HELD = ("kept_bytes", "late_bytes", "workspace_bytes", "split_workspace_bytes", "state_bytes")
_OWN = ("shape", "edges", "gradient_bytes", "table")
Costs = TypeVar("Costs", LayerCosts, Priced)


def merged(own: Costs, parts: Sequence[Costs], weights: Sequence[float]) -> Costs:
    """Return the costs of all parts together: seconds and what is sent of the slowest part, bytes held of the fullest.

    Parameters
    ----------
    own : whose rows are named and reported, one of the parts.
    weights : what the bytes that a part holds count; those of parts of weight 0 are not told of.
    """
    columns = {}
    for name in own.__dataclass_fields__:
        if name in _OWN:
            continue
        values = [getattr(part, name) for part in parts]
        if name in _HELD:
            values = [value * weight for value, weight in zip(values, weights, strict=True) if weight]
        columns[name] = np.maximum.reduce(values)
    return replace(own, **columns)


def balanced_shares(counts: Sequence[int], rates: Sequence[float], samples: int) -> list[tuple[int, ...]]:
    """Return the best ways to share out a microbatch, the samples of each replica of each part; none when none is whole.

    Parameters
    ----------
    counts : replicas of each part; rates : speed of one of them.
    """
    whole = sum(count * rate for count, rate in zip(counts, rates, strict=True))
    near = [samples * rate / whole for rate in rates]
    ranges = [range(max(1, floor(value) - 1), ceil(value) + 2) for value in near]
    fitting = [
        shares
        for shares in product(*ranges)
        if sum(count * share for count, share in zip(counts, shares, strict=True)) == samples
    ]
    slowest = {
        shares: max(share / rate for share, rate in zip(shares, rates, strict=True)) for shares in sorted(fitting)
    }
    return sorted(fitting, key=lambda shares: (slowest[shares], shares))[:MOST_SHARES]


def shards_of(parts: Sequence[ReplicaPart], degrees: Degrees) -> list[tuple[float, float]]:
    """Return for each part its `num_shards` and `padding` (`JoinedReplicas`).

    A device of a part whose replicas hold the share q has q / cp of the states, as much as one of cp / q equal shards.
    """
    shares = [1.0 / degrees.dp if part.state_share is None else part.state_share for part in parts]
    return [(degrees.cp / share, max(shares) * degrees.dp) for share in shares]


def joined_layer_costs(
    model: CostModel,
    degrees: Degrees,
    parts: Sequence[ReplicaPart],
    *,
    told: ReplicaPart | None = None,
    room_bytes: Sequence[float] = (),
) -> LayerCosts:
    """Return the costs of a stage over its parts; raises InvalidArgument for degrees that the model refuses.

    Parameters
    ----------
    told : the part that bytes are told of; without it `room_bytes`, by part, weighs them against the least room.
    """
    counts: dict[str, int] = {}
    for part in parts:
        reason = model.split_legality(degrees, part.samples)
        if reason is not None:
            raise InvalidArgument(reason, field="degrees")
        counts[part.group] = counts.get(part.group, 0) + part.num_replicas
    shape = joined_replicas(model.cluster, degrees, counts)
    seen = [JoinedReplicas(shape, shards, padding) for shards, padding in shards_of(parts, degrees)]
    rows = [
        layer_costs(model, Configuration(degrees, 1, part.samples, 1, model.order, part.group), joined=replicas)
        for part, replicas in zip(parts, seen, strict=True)
    ]
    if told is None:
        return merged(rows[0], rows, [min(room_bytes) / room for room in room_bytes])
    at = parts.index(told)
    return merged(rows[at], rows, [float(place == at) for place in range(len(rows))])
