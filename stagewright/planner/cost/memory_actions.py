"""What to do with each layer's activations: keep, recompute, move to the host, move to a peer with room.

For the layers of a stage that holds n microbatches at once, choose one action a layer so that

    minimise    sum of exposed seconds
    subject to  n * sum of kept bytes <= cap,  and what the copy lane carries beyond its hidden seconds is exposed

This is a multiple-choice knapsack with a second resource, the seconds of the copy lane. It is solved exactly by the
non-dominated sets of (bytes, seconds, lane seconds), layer after layer (Nemhauser and Ullmann 1969); equal layers keep the
sets small. AdaPipe's saved units (Sun et al. 2024) are the case without copies, MPress (Zhou et al. 2023) the one with peers,
SuperNeurons (Wang et al. 2018) and the data transfers of Jiang et al. 2021 the one with the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isqrt

from stagewright.planner.errors import Infeasible

PIECE_ELEMENTS = 2**22  # whose optimizer states come from the host at once
# Gradients of so many elements are widened at once: an accelerator takes long to begin a step, and has more memory.
_WIDENED_ELEMENTS, _WIDENED_ELEMENTS_OF_CPU = 2**25, 2**20


class ActionKind(StrEnum):
    """What happens to a layer's activations between its forward and its backward."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"
    PEER_SWAP = "peer-swap"


@dataclass(frozen=True)
class LayerAction:
    """One choice for a layer: bytes kept for each microbatch, seconds on the compute lane, seconds on the copy lane."""

    kind: ActionKind
    kept_bytes: float
    compute_s: float = 0.0
    copy_s: float = 0.0


@dataclass(frozen=True)
class ChosenActions:
    """The best choice: an action for each layer, bytes for all microbatches, exposed seconds of one microbatch."""

    actions: tuple[LayerAction, ...]
    kept_bytes: float
    exposed_s: float


def widened_elements(kind: str) -> int:
    """Return how many elements a device of a kind steps at a time where their gradients are narrower than their masters."""
    return _WIDENED_ELEMENTS_OF_CPU if kind == "cpu" else _WIDENED_ELEMENTS


def recompute_action(
    input_bytes: float, forward_s: float, *, saved_bytes: float = 0.0, saved_s: float = 0.0
) -> LayerAction:
    """Return the action of running a layer's forward again from its input.

    `saved_bytes` more may stay to spare `saved_s` of it: with attention's output kept, its forward is not run twice
    (DistFlashAttn's rematerialisation-aware checkpointing; LoongTrain's selective checkpointing).
    """
    return LayerAction(ActionKind.RECOMPUTE, input_bytes + saved_bytes, compute_s=forward_s - saved_s)


def offload_action(kept_bytes: float, input_bytes: float, host_bytes_per_s: float) -> LayerAction:
    """Return the action of copying a layer's activations out and back; only its input may stay (`input_bytes`)."""
    moved = kept_bytes - input_bytes
    return LayerAction(ActionKind.OFFLOAD, input_bytes, copy_s=2 * moved / host_bytes_per_s)


def peer_swap_action(kept_bytes: float, link_bytes_per_s: Sequence[float]) -> LayerAction:
    """Return the action of striping activations over the links to several peers, out and back (MPress)."""
    return LayerAction(ActionKind.PEER_SWAP, 0.0, copy_s=2 * kept_bytes / sum(link_bytes_per_s))


def choose_actions(
    layers: Sequence[Sequence[LayerAction]], *, cap_bytes: float, num_live: int = 1, hidden_copy_s: float = 0.0
) -> ChosenActions:
    """Return the actions with the fewest exposed seconds that fit, the least copying among equals.

    Raises Infeasible with the least bytes possible when nothing fits.

    Parameters
    ----------
    layers : the actions each layer offers.
    num_live : microbatches the stage holds at once.
    hidden_copy_s : seconds of copying that compute hides, for each microbatch.
    """
    least = [0.0] * (len(layers) + 1)
    for index in range(len(layers) - 1, -1, -1):
        least[index] = least[index + 1] + min(action.kept_bytes for action in layers[index])
    if num_live * least[0] > cap_bytes * (1 + 1e-12):
        raise Infeasible(
            f"activations need at least {num_live * least[0]:.6g} bytes ({num_live} microbatches), the cap is "
            f"{cap_bytes:.6g}",
            field="memory_cap",
            hint="use a smaller microbatch, more pipeline ranks or fewer microbatches in flight",
        )
    frontier: list[tuple[float, float, float, tuple[int, ...]]] = [(0.0, 0.0, 0.0, ())]
    for index, actions in enumerate(layers):
        grown = [
            (kept + action.kept_bytes, compute + action.compute_s, copy + action.copy_s, (*chosen, position))
            for kept, compute, copy, chosen in frontier
            for position, action in enumerate(actions)
            if num_live * (kept + action.kept_bytes + least[index + 1]) <= cap_bytes * (1 + 1e-12)
        ]
        frontier = _non_dominated(grown)
    kept, compute, copy, chosen = min(
        frontier, key=lambda state: (state[1] + max(0.0, state[2] - hidden_copy_s), state[2], state[0], state[3])
    )
    return ChosenActions(
        tuple(actions[position] for actions, position in zip(layers, chosen, strict=True)),
        num_live * kept,
        compute + max(0.0, copy - hidden_copy_s),
    )


def _non_dominated(
    states: Sequence[tuple[float, float, float, tuple[int, ...]]],
) -> list[tuple[float, float, float, tuple[int, ...]]]:
    """Return the states that no other beats in bytes, compute and copy seconds at once."""
    kept: list[tuple[float, float, float, tuple[int, ...]]] = []
    for state in sorted(states):
        if not any(other[1] <= state[1] and other[2] <= state[2] for other in kept):
            kept.append(state)
    return kept


@dataclass(frozen=True)
class Swap:
    """Bytes that one pipeline rank keeps on another, and the seconds of moving them out and back."""

    source: int
    target: int
    moved_bytes: float
    seconds: float


def spare_memory_swaps(
    peak_bytes: Sequence[float], cap_bytes: float, *, link_bytes_per_s: Sequence[Sequence[float]]
) -> tuple[list[Swap], list[float]]:
    """Return swaps that bring every rank to the cap with the room of the others, and what is left over for each rank.

    Ranks over the cap are served from the fullest on, each by the peers with the fastest links first; all its peers work
    side by side, so a rank's swap lasts as long as its slowest stripe. What is left must be recomputed.
    """
    room = [max(0.0, cap_bytes - peak) for peak in peak_bytes]
    left = [max(0.0, peak - cap_bytes) for peak in peak_bytes]
    swaps = []
    for source in sorted(range(len(left)), key=lambda rank: (-left[rank], rank)):
        peers = sorted(
            (rank for rank in range(len(room)) if rank != source),
            key=lambda rank: (-link_bytes_per_s[source][rank], rank),
        )
        for target in peers:
            moved = min(left[source], room[target])
            if moved > 0:
                swaps.append(Swap(source, target, moved, 2 * moved / link_bytes_per_s[source][target]))
                left[source] -= moved
                room[target] -= moved
    return swaps, left


def segment_layers(num_layers: int) -> int:
    """Return the segment length with the least memory when only segment ends are kept: about sqrt(L) (Chen et al. 2016)."""
    root = isqrt(num_layers)
    return min((root, root + 1), key=lambda length: (segmented_memory(num_layers, max(1, length)), length)) or 1


def segmented_memory(num_layers: int, segment: int) -> float:
    """Return ceil(L / segment) kept ends plus one segment's inside, in layers."""
    return -(-num_layers // segment) + segment


def least_peak_bytes(layer_bytes: Sequence[float]) -> float:
    """Return what no plan of freeing, offloading and recomputing goes below: the largest layer (SuperNeurons)."""
    return max(layer_bytes)


def offload_timeline_s(
    forward_s: Sequence[float], backward_s: Sequence[float], moved_bytes: Sequence[float], host_bytes_per_s: float
) -> tuple[float, float]:
    """Return the step's seconds with offload on a copy lane each way, and what of it is not compute.

    A layer's activations leave after its forward and must be back before its backward; prefetches run in the order of
    need as soon as the lane is free and the copy out has ended. The lane out and the lane in work at the same time.
    """
    now, lane_out = 0.0, 0.0
    left_at = []
    for seconds, moved in zip(forward_s, moved_bytes, strict=True):
        now += seconds
        lane_out = max(lane_out, now) + moved / host_bytes_per_s if moved else lane_out
        left_at.append(lane_out if moved else 0.0)
    lane_in = now
    for index in range(len(forward_s) - 1, -1, -1):
        arrived = now
        if moved_bytes[index]:
            lane_in = max(lane_in, left_at[index]) + moved_bytes[index] / host_bytes_per_s
            arrived = lane_in
        now = max(now, arrived) + backward_s[index]
    return now, now - sum(forward_s) - sum(backward_s)


def offloaded_elements(share: float, num_elements: float) -> int:
    """Return how many of the elements that an optimizer steps have their states on the host."""
    return round(share * num_elements)


def streamed_states_s(state_bytes: float, host_bytes_per_s: float) -> float:
    """Return what a step waits for optimizer states that live on the host and are updated on the device (Mist, Zhu et al. 2025).

    Each layer's states come in and go out again, full duplex and one layer behind the other, so the way in is what shows:
    bytes over bandwidth, in addition to the update itself.
    """
    return state_bytes / host_bytes_per_s


def optimizer_offload_s(
    num_parameters: float, *, host_bytes_per_s: float, gradient_bytes: float, parameter_bytes: float, host_step_s: float
) -> float:
    """Return an optimizer step on the host: gradients down, update, weights up (ZeRO-Offload, Ren et al. 2021)."""
    return num_parameters * (gradient_bytes + parameter_bytes) / host_bytes_per_s + host_step_s
