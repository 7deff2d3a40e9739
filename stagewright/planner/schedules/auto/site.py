"""The placements that a request allows, each as an instance with its own costs.

With two copies of the model there is one: the copies run over the ranks in opposite directions, a stage of each on a rank, and share
the microbatches evenly. Each rank then holds the weights and gradients of two stages, which a cap on activations does not see.

`PlacementChoice.OPERATORS` allows every map of the entries to the ranks that leaves no rank empty: planning of operators rather than stages,
in two levels, the maps above and an order for each below. Where all caps are equal, ranks are named in the order in which the model
first uses them; otherwise names matter. The bounds of the maps prune, so most of them are never searched.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.schedules.auto.instance import Instance, make_instance
from stagewright.planner.schedules.auto.request import MOST_COPIES, AutoRequest, PlacementChoice
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.gems import opposite_placement
from stagewright.planner.schedules.schedule import loop_placement, wave_placement

MOST_MAPS = 4096  # of entries to ranks


@dataclass(frozen=True, eq=False)
class Site:
    """One placement by name ("loop", "v", "wave", "given", "operators" or "bidirectional") with its instance.

    `costs` are of the stages of one copy, `num_chunks` the most of them that a rank holds.
    """

    name: str
    num_chunks: int
    costs: StageCosts
    instance: Instance


def sites(request: AutoRequest) -> list[Site]:
    """Return the placements that fit the costs and the cap; Infeasible, with the least cap, when none fits the cap."""
    found: list[Site] = []
    refused: list[Infeasible] = []
    least_caps: list[float] = []
    shapes = list(_shapes(request))
    for name, chunks, placement in shapes:
        costs = stage_costs(request.costs, len(placement))
        if costs is None:
            continue
        costs = costs.without_growth()
        try:
            instance = make_instance(
                costs,
                placement,
                num_ranks=request.num_ranks,
                num_microbatches=request.num_microbatches,
                latency_s=request.latency_s,
                memory_cap=request.memory_cap,
            )
        except Infeasible as error:
            refused.append(error)
            least_caps.append(float(np.bincount(placement, weights=costs.activation).max()))
            continue
        found.append(Site(name, chunks, costs, instance))
    if found:
        return found
    if refused:
        nearest = int(np.argmin(least_caps))
        raise Infeasible(
            refused[nearest].message, field="memory_cap", hint=f"the smallest cap that works is {least_caps[nearest]:g}"
        )
    counts = sorted({len(placement) for _, _, placement in shapes})
    raise InvalidArgument(
        f"{request.costs.num_stages} costs cannot be cut into {' or '.join(map(str, counts))} virtual stages",
        field="costs",
        hint="give one entry for each virtual stage, a multiple of it, or equal entries",
    )


def bidirectional_site(request: AutoRequest) -> Site | None:
    """Return the placement of two copies in opposite directions; None where the request, the costs, T or the cap rule it out."""
    ranks = request.num_ranks
    costs = stage_costs(request.costs, ranks)
    is_asked = request.copies == MOST_COPIES and request.placement is PlacementChoice.ANY and 1 in request.chunk_counts
    if not is_asked or ranks == 1 or request.num_microbatches % MOST_COPIES or costs is None:
        return None
    costs = costs.without_growth()
    try:
        instance = make_instance(
            costs,
            opposite_placement(ranks),
            num_ranks=ranks,
            num_microbatches=request.num_microbatches,
            latency_s=request.latency_s,
            memory_cap=request.memory_cap,
        )
    except Infeasible:
        return None
    return Site("bidirectional", 1, costs, instance)


def _shapes(request: AutoRequest) -> list[tuple[str, int, npt.NDArray[np.int32]]]:
    choice = request.placement
    ranks = request.num_ranks
    if not isinstance(choice, PlacementChoice):
        placement = np.asarray(choice, dtype=np.int32).ravel()
        chunks = int(np.bincount(placement, minlength=ranks).max())
        return [("given", chunks, placement)]
    if choice is PlacementChoice.OPERATORS:
        return _every_map(request)
    shapes: list[tuple[str, int, npt.NDArray[np.int32]]] = []
    for chunks in sorted(set(request.chunk_counts)):
        if choice in (PlacementChoice.ANY, PlacementChoice.LOOP):
            shapes.append(("loop", chunks, loop_placement(ranks, chunks)[0]))
        # With one rank, or one chunk, a wave is a loop.
        if ranks > 1 and chunks % 2 == 0:
            if chunks == 2 and choice is not PlacementChoice.LOOP:
                shapes.append(("v", chunks, wave_placement(ranks, chunks)[0]))
            elif choice in (PlacementChoice.ANY, PlacementChoice.WAVE):
                shapes.append(("wave", chunks, wave_placement(ranks, chunks)[0]))
    if not shapes:
        raise InvalidArgument(
            f"placement {choice} has no shape with {' or '.join(map(str, request.chunk_counts))} chunks",
            field="chunk_counts",
            hint="v has 2 chunks, wave an even number of them",
        )
    return shapes


def _every_map(request: AutoRequest) -> list[tuple[str, int, npt.NDArray[np.int32]]]:
    entries, ranks = request.costs.num_stages, request.num_ranks
    if ranks**entries > MOST_MAPS:
        raise InvalidArgument(
            f"{entries} entries go to {ranks} ranks in {ranks**entries} ways, at most {MOST_MAPS} are looked at",
            field="placement",
            hint="sum neighbouring entries, or take placement any",
        )
    are_alike = np.ptp(np.broadcast_to(0.0 if request.memory_cap is None else request.memory_cap, ranks)) == 0.0
    shapes = []
    for ranks_of in itertools.product(range(ranks), repeat=entries):
        used = list(dict.fromkeys(ranks_of))
        if len(used) == ranks and (not are_alike or used == sorted(used)):
            shapes.append(("operators", max(map(ranks_of.count, used)), np.array(ranks_of, dtype=np.int32)))
    if not shapes:
        raise InvalidArgument(
            f"{entries} entries cannot leave none of {ranks} ranks empty",
            field="placement",
            hint="give as many entries as there are ranks at least",
        )
    return shapes


def stage_costs(costs: StageCosts, num_stages: int) -> StageCosts | None:
    """Return the costs of `num_stages` virtual stages, or None when the entries cannot be cut that way."""
    entries = costs.num_stages
    if entries == num_stages:
        return costs
    if entries % num_stages == 0:
        return _grouped(costs, num_stages)
    if _is_uniform(costs):
        share = entries / num_stages
        return StageCosts.of(
            *(
                np.full(num_stages, values[0] * share)
                for values in (costs.forward_s, costs.input_grad_s, costs.weight_grad_s)
            ),
            activation=np.full(num_stages, costs.activation[0] * share),
            freed_at_input_grad=np.full(num_stages, costs.freed_at_input_grad[0]),
            recompute_s=np.full(num_stages, costs.recompute_s[0] * share),
        )
    return None


def _grouped(costs: StageCosts, num_stages: int) -> StageCosts:
    def total(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        sums: npt.NDArray[np.float64] = values.reshape(num_stages, -1).sum(axis=1)
        return sums

    activation = total(costs.activation)
    freed = total(costs.activation * costs.freed_at_input_grad)
    return StageCosts.of(
        total(costs.forward_s),
        total(costs.input_grad_s),
        total(costs.weight_grad_s),
        activation=activation,
        freed_at_input_grad=np.divide(freed, activation, out=np.zeros_like(freed), where=activation > 0.0),
        recompute_s=total(costs.recompute_s),
    )


def _is_uniform(costs: StageCosts) -> bool:
    arrays = (
        costs.forward_s,
        costs.input_grad_s,
        costs.weight_grad_s,
        costs.activation,
        costs.freed_at_input_grad,
        costs.recompute_s,
    )
    return all(bool((values == values[0]).all()) for values in arrays)
