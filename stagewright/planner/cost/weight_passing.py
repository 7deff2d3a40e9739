"""WeiPipe: weights travel round the ring of ranks and activations stay, chosen by what is smaller.

With 12 h^2 parameters a transformer layer and L / D layers on a rank, passing weights moves, for each turn of one
microbatch on every rank, the weights once forward, once more backward, and their gradients:

    weights      3 * 12 h^2 * L / D     elements a rank
    activations  2 * b s h              elements a rank: the boundary forward and its gradient back

so weights are passed iff 18 h L / D < b s. Long sequences favour it, wide models do not.

Paper: Lin et al., WeiPipe: Weight Pipeline Parallelism for Communication-Effective Long-Context Training, PPoPP 2025.
"""

from __future__ import annotations

from stagewright.planner.errors import InvalidArgument

PARAMETERS = 12  # of a layer, in h^2


def weight_pass_elements(hidden: int, num_layers: int, num_ranks: int) -> float:
    """Return the elements that a rank sends for each microbatch when weights and their gradients travel."""
    if num_ranks < 1 or num_layers < 1 or hidden < 1:
        raise InvalidArgument(
            f"{num_layers} layers of width {hidden} on {num_ranks} ranks: all are at least 1", field="num_ranks"
        )
    return 3 * PARAMETERS * hidden**2 * num_layers / num_ranks


def activation_pass_elements(microbatch: int, sequence: int, hidden: int) -> float:
    """Return the elements that a rank sends for each microbatch when activations and their gradients travel."""
    return 2.0 * microbatch * sequence * hidden


def passes_weights(microbatch: int, sequence: int, hidden: int, *, num_layers: int, num_ranks: int) -> bool:
    """Return whether passing weights sends less than passing activations."""
    return weight_pass_elements(hidden, num_layers, num_ranks) < activation_pass_elements(microbatch, sequence, hidden)
