"""A step of optimizers that work on whole matrices: Muon and Shampoo, beside what their states move through memory.

Muon (Jordan et al. 2024; Liu et al., Muon is Scalable for LLM Training, 2025) orthogonalises the momentum of every m x n
matrix, m <= n, by N = 5 Newton-Schulz iterations A = X X^T, B = b A + c A A, X = a X + B X in bf16:

    FLOP = N (4 m^2 n + 2 m^3)

Matrices that tensor parallelism cuts are gathered first, 2 m n bytes over the tensor group, and orthogonalised on each of
its devices. Under ZeRO a device owns 1 / n_dp of the matrices, so its share of the FLOP is divided like any step; a matrix cut by
shard boundaries is gathered over the replicas. Liu et al. bound that by all of them, 2 bytes a parameter
(`Optimizer.gathered_bytes`): with 4-byte gradients scattered and 4-byte weights gathered, (4 + 4 + 2) / (4 + 4) = 1.25 of
AdamW's traffic. States: one moment where AdamW has two.

Shampoo (Gupta et al., ICML 2018; Shi et al., A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo
Optimizer, 2023) preconditions blocks of at most b x b, b = 1,024, with G <- L^(-1/4) G R^(-1/4). A block of p x q costs

    statistics     2 p^2 q + 2 p q^2      L += G G^T,  R += G^T G
    direction      2 p^2 q + 2 p q^2
    roots          25 (p^3 + q^3) / 100   an eigendecomposition of both, once in 100 steps

and holds L, R and their roots, 2 (p^2 + q^2) numbers of 4 bytes: 16 bytes a parameter of full square blocks, with grafting's
second moment and the momentum 24 (`planner.statistics_bytes` says what a run holds beyond that). Under ZeRO blocks
have one owner each, so nothing is gathered that the weights' own all-gather does not carry. Where tensor parallelism
cuts a matrix its gradient is gathered over the group, whose devices share its blocks, and the directions are reduced
and scattered in the width of the statistics.

Only matrices of blocks count; embeddings, heads, norms and biases are stepped elementwise, as all three papers do. Not
modelled: their second moment beside Muon's one (states are counted as if all parameters were the matrices'), layers that
were measured without operators (their bytes alone count).
"""

from __future__ import annotations

from collections.abc import Iterator

from stagewright.planner.cost.communication import collective_s
from stagewright.planner.cost.rank_groups import RankGroups
from stagewright.planner.cost.roofline import Roofline
from stagewright.planner.documents.job import Optimizer
from stagewright.planner.documents.operator import Operator
from stagewright.planner.documents.profile import LayerClass

MATRIX_OPTIMIZERS = ("muon", "shampoo")
NEWTON_SCHULZ_STEPS = 5
GATHERED_BYTES = 2.0  # for Newton-Schulz in bf16
BLOCK = 1024
ROOT_FLOPS = 25.0
STEPS_BETWEEN_ROOTS = 100
_INTEGER_BYTES = 4.0


def newton_schulz_flops(rows: int, columns: int) -> float:
    """Return the FLOP of orthogonalising one matrix."""
    m, n = sorted((float(rows), float(columns)))
    return NEWTON_SCHULZ_STEPS * (4 * m**2 * n + 2 * m**3)


def shampoo_flops(rows: int, columns: int) -> float:
    """Return the FLOP of one step on a matrix in blocks, an average one where roots are taken now and then."""
    return sum(
        count * (2 * (2 * p**2 * q + 2 * p * q**2) + ROOT_FLOPS * (p**3 + q**3) / STEPS_BETWEEN_ROOTS)
        for p, q, count in _blocks(rows, columns)
    )


def shampoo_state_bytes(rows: int, columns: int) -> float:
    """Return the bytes of statistics and roots of one matrix."""
    return sum(count * 2 * (p**2 + q**2) * 4.0 for p, q, count in _blocks(rows, columns))


def newton_schulz_elements(rows: int, columns: int, count: int = 1) -> float:
    """Return the elements that are there beside `count` stacked matrices while they are made orthogonal.

    Of the matrices X, A, a X and the products behind them that are written one after the other, three times live together:
    (X, A, a X, b A, c A, c A A), (X, A, a X, B, B X) and (X, A, a X, B X, their sum); the second never holds the most.
    """
    m, n = sorted((float(rows), float(columns)))
    return count * max(2 * m * n + 4 * m * m, 4 * m * n + m * m)


def shampoo_step_bytes(rows: int, columns: int, element_bytes: float) -> float:
    """Return the bytes that are there beside the direction of a matrix in a step that renews its roots.

    Of one tile: two products, or what an eigendecomposition of a statistic of n x n makes: vectors, their product with roots of
    the values, and the root, 3 n^2; LAPACK's workspace in the place of the last two with n values, 2 n^2 + 7 n and 5 n integers.
    """
    return max(
        max(_root_bytes(max(p, q), element_bytes), 2 * p * q * element_bytes) for p, q, _ in _blocks(rows, columns)
    )


def _root_bytes(size: float, element_bytes: float) -> float:
    return (3 * size * size + 7 * size) * element_bytes + 5 * size * _INTEGER_BYTES


def matrix_step_s(optimizer: Optimizer, layer: LayerClass, groups: RankGroups, roofline: Roofline) -> float:
    """Return what an optimizer's matrices add to one layer's step on one device, before ZeRO divides it; 0 for others."""
    if optimizer.name not in MATRIX_OPTIMIZERS or layer.kind != "block" or layer.backward != "full":
        return 0.0
    return sum(
        _operator_s(optimizer, operator, groups, roofline) for operator in layer.operators if is_matrix(operator)
    )


def is_matrix(operator: Operator) -> bool:
    """Return whether an operator of a block has a matrix, or one for each of its groups."""
    return operator.parameters > 0 and operator.output_features > 0 and operator.inner_features > 0


def _operator_s(optimizer: Optimizer, operator: Operator, groups: RankGroups, roofline: Roofline) -> float:
    rows, columns = operator.output_features, operator.inner_features
    degrees = groups.degrees
    count = operator.num_groups / (degrees.ep if "ep" in operator.split else 1)
    inside = groups.etp if "etp" in operator.split else groups.tp
    is_cut = bool({"tp", "kv", "vocab", "etp"} & set(operator.split)) and inside.size > 1
    if optimizer.name == "muon":
        each_s = roofline.seconds("matmul", newton_schulz_flops(rows, columns), 0.0)
        gather_s = collective_s("all-gather", GATHERED_BYTES * rows * columns, inside) if is_cut else 0.0
        return count * (each_s + gather_s)
    each_s = roofline.seconds("matmul", shampoo_flops(rows, columns), 0.0)
    if not is_cut:
        return count * each_s
    numbers = float(rows * columns)
    gathered_s = collective_s("all-gather", optimizer.gradient_bytes * numbers, inside)
    width = optimizer.stepped_bytes
    return count * (each_s / inside.size + gathered_s + collective_s("reduce-scatter", width * numbers, inside))


def _blocks(rows: int, columns: int) -> Iterator[tuple[float, float, int]]:
    """Yield height, width and number of the blocks of each size."""
    for p, down in tile_sides(rows):
        for q, across in tile_sides(columns):
            yield float(p), float(q), down * across


def tile_sides(size: int) -> list[tuple[int, int]]:
    """Return the sides of the tiles along one side of a matrix, each with how many there are of it."""
    whole, rest = divmod(size, BLOCK)
    return [(piece, count) for piece, count in ((BLOCK, whole), (rest, 1)) if piece and count]
