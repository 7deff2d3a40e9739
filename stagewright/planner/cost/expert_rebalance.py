"""Moving hot experts to idle devices of the node while the others compute (FEPLB, Qi et al. 2026).

Tokens are dispatched to the experts' home devices as ever. Of the E / e experts of a device the `dynamic` busiest may then move, with
their weights and the tokens that came for them, to another device of the node: copy engines carry both over NVLink and take no
time of the kernels, which meanwhile run the static experts. With load L_d tokens on device d, s_d of them static,

    tokens of the layer   max over d of L'_d          straggler = max L' - mean L'
    copy of device d      (weights + tokens that come in or go out, the larger) / B_copy
    hidden                copy of d <= t s_d          t seconds a token

The plan is made for each microbatch from its counts, greedily: the busiest device of a node gives one dynamic expert to the
idlest, the one that lowers the larger of the two loads most, as long as that falls and both devices' copies stay hidden behind what
is static on them. So a layer is never longer than without. Moved weights are copied again for the backward, and their gradients
home, which the same bandwidth hides behind twice the compute. Not modelled: tokens split over two copies of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.expert_routing import Placement
from stagewright.planner.errors import InvalidArgument

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CopyRates:
    """What computing and copying costs.

    Parameters
    ----------
    token_s : seconds of one token in an expert; token_bytes, expert_bytes : of one token (in and out), of one expert's weights.
    copy_bytes_per_s : of a device's copy engines, each direction.
    """

    token_s: float
    token_bytes: float
    expert_bytes: float
    copy_bytes_per_s: float


@dataclass(frozen=True, eq=False)
class Rebalanced:
    """Where experts run for one microbatch.

    Parameters
    ----------
    placement : the device of each expert.
    loads : tokens of each device, [e]; static : those of experts that may not move.
    copy_s : of each device's copy engines, [e].
    moved : experts that run away from home.
    """

    placement: Placement
    loads: Floats
    static: Floats
    copy_s: Floats
    moved: tuple[int, ...]

    @property
    def straggler_tokens(self) -> float:
        """Tokens of the busiest device above the mean."""
        return float(self.loads.max() - self.loads.mean())


def rebalanced(
    loads: Sequence[float], home: Placement, rates: CopyRates, *, devices_per_node: int, dynamic: int
) -> Rebalanced:
    """Return where the experts run.

    Parameters
    ----------
    loads : tokens of each expert over all devices, [E].
    home : the device of each expert, one each.
    dynamic : experts of a device that may move; 0 leaves all at home.

    Raises InvalidArgument for an expert with several homes.
    """
    several = next((expert for expert, holders in enumerate(home) if len(holders) != 1), None)
    if several is not None:
        raise InvalidArgument(
            f"expert {several} is on {len(home[several])} devices, one is rebalanced from its one home", field="home"
        )
    where = np.array([holders[0] for holders in home])
    tokens = np.asarray(loads, dtype=np.float64)
    count = int(where.max()) + 1
    may_move = _dynamic(tokens, where, count, dynamic)
    static, total = np.zeros(count), np.zeros(count)
    np.add.at(static, where[~may_move], tokens[~may_move])
    np.add.at(total, where, tokens)
    moving = rates.expert_bytes + rates.token_bytes * tokens
    sent, received = np.zeros(count), np.zeros(count)
    budget = static * rates.token_s * rates.copy_bytes_per_s
    at = where.copy()
    for first in range(0, count, devices_per_node):
        node = np.arange(first, min(first + devices_per_node, count))
        while True:
            busy, idle = int(node[np.argmax(total[node])]), int(node[np.argmin(total[node])])
            found = [
                expert
                for expert in np.flatnonzero(may_move & (at == busy) & (where == busy)).tolist()
                if max(total[busy] - tokens[expert], total[idle] + tokens[expert]) < total[busy] - 1e-9
                and sent[busy] + moving[expert] <= budget[busy]
                and received[idle] + moving[expert] <= budget[idle]
            ]
            if not found:
                break
            expert = min(found, key=lambda x: (max(total[busy] - tokens[x], total[idle] + tokens[x]), x))
            at[expert] = idle
            total[busy] -= tokens[expert]
            total[idle] += tokens[expert]
            sent[busy] += moving[expert]
            received[idle] += moving[expert]
    copy_s = np.maximum(sent, received) / rates.copy_bytes_per_s
    moved = tuple(np.flatnonzero(at != where).tolist())
    return Rebalanced(tuple((int(device),) for device in at), total, static, copy_s, moved)


def _dynamic(tokens: Floats, where: npt.NDArray[np.int64], count: int, dynamic: int) -> npt.NDArray[np.bool_]:
    """Return which experts may move: the busiest of each device, never all of them."""
    chosen = np.zeros(len(tokens), dtype=np.bool_)
    for device in range(count):
        own = np.flatnonzero(where == device)
        order = own[np.argsort(-tokens[own], kind="stable")]
        chosen[order[: min(dynamic, len(own) - 1)]] = True
    return chosen
