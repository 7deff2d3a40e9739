"""Rerouting around a lost rank: the microbatches of its stage go to the same stage of the other replicas (ReCycle).

R pipelines of D stages train in data parallel; rank (r, s) is lost. Its replica's microbatches are dealt in turn to the R - 1
peers that hold stage s too, and all other stages of the replica stay where they are:

    replica 0   s0 -> s1 -> [lost] -> s3        microbatch 0 visits stage 2 of replica 1, microbatch 1 that of replica 2, ...
    replica 1   s0 -> s1 ->   s2   -> s3
    replica 2   s0 -> s1 ->   s2   -> s3

A peer then does R / (R - 1) of its work at stage s. Bubbles take what fits: the backward is split, so that input gradients go first and
weight gradients fill the gaps. The orders come from the list scheduler over its flags under a cap on live activations; no
optimality. The update is that of all replicas, because no microbatch is dropped.

Paper: Gandhi et al., ReCycle: Resilient Training of Large DNNs using Pipeline Adaptation, SOSP 2024.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.list_scheduling import (
    BACKWARD,
    FORWARD,
    WEIGHT,
    Words,
    chains_of,
    decode,
    loose_rule,
    measure,
    orders_of,
)
from stagewright.planner.schedules.schedule import Schedule

_SHARES = (0.0, 0.5, 1.0)  # of W: how long a forward or an input gradient may wait for one


def rerouted(
    costs: StageCosts,
    *,
    num_replicas: int,
    num_microbatches: int,
    lost: tuple[int, int] | None,
    latency_s: float = 0.0,
    memory_cap: float | None = None,
) -> Schedule:
    """Return one schedule of all replicas' ranks without the lost one, rank r * D + s before renumbering.

    Parameters
    ----------
    costs : of the D stages of a replica.
    num_microbatches : of all replicas together.
    lost : (replica, stage); None for the schedule without a loss, made in the same way.
    memory_cap : most activations of a rank, in microbatches; a peer of the lost rank holds more of them, D R / (R - 1) unless told.

    Raises InvalidArgument for a replica or stage that does not exist, and when no replica is left to take the microbatches.
    """
    stages = costs.num_stages
    placement = _pipes(num_replicas, stages, lost)
    if num_microbatches < len(placement):
        raise InvalidArgument(
            f"{num_microbatches} microbatches for {len(placement)} routes; each route takes at least 1",
            field="num_microbatches",
            hint=f"give at least {len(placement)}",
        )
    chains = chains_of(placement, costs, num_microbatches, latency_s=latency_s, held=np.ones(stages))
    most = memory_cap if memory_cap is not None else np.ceil(stages * num_replicas / max(num_replicas - 1, 1))
    loose = loose_rule(chains)
    weight_s = float(chains.seconds[WEIGHT].mean())
    late_s = 4.0 * float(chains.seconds.sum()) * float(chains.units.max())
    best: Words | None = None
    best_s = np.inf
    for is_forward_first, forward, backward in itertools.product((False, True), _SHARES, _SHARES):
        target_s, tolerance_s = np.zeros_like(chains.seconds), np.zeros_like(chains.seconds)
        target_s[BACKWARD if is_forward_first else FORWARD] = late_s
        target_s[WEIGHT] = 2.0 * late_s
        tolerance_s[FORWARD], tolerance_s[BACKWARD] = forward * weight_s, backward * weight_s
        words = decode(
            chains, loose._replace(target_s=target_s, tolerance_s=tolerance_s, cap=np.full(len(loose.cap), float(most)))
        )
        makespan_s = measure(chains, words).makespan_s
        if best is None or makespan_s < best_s - chains.slack_s:
            best, best_s = words, makespan_s
    assert best is not None, "there are flags"
    return Schedule("rerouted", num_microbatches, placement, orders_of(chains, best, len(placement)))


def _pipes(num_replicas: int, num_stages: int, lost: tuple[int, int] | None) -> npt.NDArray[np.int32]:
    """Return the routes through the ranks [routes, stages]; microbatch m takes route m mod routes."""
    if num_replicas < 1:
        raise InvalidArgument(f"num_replicas is {num_replicas}, there is at least 1", field="num_replicas")
    whole = np.arange(num_replicas * num_stages, dtype=np.int32).reshape(num_replicas, num_stages)
    if lost is None:
        return whole
    replica, stage = lost
    if not (0 <= replica < num_replicas and 0 <= stage < num_stages):
        raise InvalidArgument(
            f"rank {lost} was lost, there are {num_replicas} replicas of {num_stages} stages", field="lost"
        )
    peers = [other for other in range(num_replicas) if other != replica]
    if not peers:
        raise InvalidArgument(
            "the only replica lost a rank, no other holds its stage", field="num_replicas", hint="plan again"
        )
    routes = np.repeat(whole[None], len(peers), axis=0)
    for turn, peer in enumerate(peers):
        routes[turn, replica, stage] = whole[peer, stage]
    gone = int(whole[replica, stage])
    routes = np.where(routes > gone, routes - 1, routes).astype(np.int32)
    return np.ascontiguousarray(routes.reshape(-1, num_stages))
