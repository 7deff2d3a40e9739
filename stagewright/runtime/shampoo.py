"""Shampoo: the gradient of every block's matrix between roots of its statistics, with the size of Adam's step.

Matrices are cut into pieces of at most 1,024 x 1,024. With a piece's gradient G, statistics L and R, and V of Adam,

    L <- L + G G^T,  R <- R + G^T G                roots P = L^(-1/4), Q = R^(-1/4), renewed once in 100 steps
    V <- beta V + (1 - beta) G^2,  A = G / (sqrt(V / (1 - beta^t)) + 1e-8)
    D = P G Q |A| / |P G Q|                        any tensor that is no block's matrix: D = A
    M <- mu M + D,  W <- (1 - lr decay) W - lr M

Roots come from an eigendecomposition; eigenvalues are raised by a millionth of the largest. Statistics, roots and moments are
in the type of what is stepped. A piece is whole where it is stepped, since statistics of parts would be another method's: where
ZeRO divides a bucket it cuts matrices between bands of pieces only (`sharding`), so that each piece has one owner, nothing but the
weights is gathered, and shares of a bucket differ by up to a band.

Where a group splits a matrix (tensor parallelism, or that of experts), its ranks gather the gradient whole, sum |A|^2
of each piece, and deal the pieces out: each keeps the statistics and makes D of its own, and D is reduced and
scattered to who holds the weights. Moments lie with those.

Papers: Gupta et al., Shampoo, ICML 2018; Shi et al., A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo
Optimizer, 2023 (pieces and grafting).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewright.planner.cost.matrix_optimizer import STEPS_BETWEEN_ROOTS
from stagewright.planner.matrix_tiles import Tile
from stagewright.runtime.matrix_layout import Layout, Piece, SplitTensor, statistics_key
from stagewright.runtime.matrix_optimizer import MatrixOptimizer

_BETA = 0.999
_EPSILON = 1e-8
_RAISED = 1e-6


class Shampoo(MatrixOptimizer):
    """Steps whole tensors, or parts that hold whole bands of a matrix's pieces; weight decay is decoupled."""

    _due: frozenset[int] = frozenset()  # ids of parameters whose next step renews roots, whatever its number

    def renew_roots(self) -> None:
        """Let the next step of every parameter renew its roots."""
        self._due = frozenset(id(parameter) for group in self.param_groups for parameter in group["params"])

    def _step_one(
        self, parameter: nn.Parameter, gradient: Tensor, layout: Layout, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        if not state:
            state["step"] = torch.tensor(0.0)
            state["momentum_buffer"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        renews = id(parameter) in self._due or int(state["step"]) % STEPS_BETWEEN_ROOTS == 1
        self._due -= {id(parameter)}
        for piece in layout.pieces:
            _step_piece(parameter, gradient.reshape(-1)[piece.part], piece, state, group, renews=renews)


def _step_piece(
    parameter: Tensor,
    gradient: Tensor,
    piece: Piece,
    state: dict[str, Tensor],
    group: dict[str, Any],
    *,
    renews: bool,
) -> None:
    """Step the elements of one tensor, given their gradient."""
    target, first, second = (
        value.view(-1)[piece.part] for value in (parameter, state["momentum_buffer"], state["exp_avg_sq"])
    )
    count, wide = int(state["step"]), gradient.to(parameter.dtype)
    second.mul_(_BETA).addcmul_(wide, wide, value=1 - _BETA)
    direction = (second / (1 - _BETA**count)).sqrt_().add_(_EPSILON)
    torch.div(wide, direction, out=direction)
    if piece.is_matrix and piece.split is None:
        _precondition(direction, wide, piece, state, renews=renews)
    elif piece.split is not None:
        del wide
        _precondition_together(direction, gradient, piece, piece.split, state, renews=renews)
    first.mul_(group["momentum"]).add_(direction)
    target.mul_(1 - group["lr"] * group["weight_decay"])
    target.add_(first, alpha=-group["lr"])


def _precondition(direction: Tensor, gradient: Tensor, piece: Piece, state: dict[str, Tensor], *, renews: bool) -> None:
    """Turn the direction of each tile of a matrix, in place, keeping its size; add to the tile's statistics."""
    width = piece.shape[-1]
    onto, rows = direction.view(-1, width), gradient.view(-1, width)
    for tile in piece.tiles():
        place, name = _place_of(tile, piece), statistics_key(piece.place, tile.number)
        _turn(onto[place], rows[place], onto[place].norm(), state, name, renews=renews)


def _precondition_together(
    direction: Tensor, gradient: Tensor, piece: Piece, split: SplitTensor, state: dict[str, Tensor], *, renews: bool
) -> None:
    """Do so to this rank's part of split matrices, tile by tile where their statistics are; collectives."""
    tiles = list(piece.tiles())
    places = [_place_of(tile, piece) for tile in tiles]
    onto = split.placed(direction)
    squares = torch.stack([onto[place].norm().square() for place in places])
    dist.all_reduce(squares, group=split.split.group.group)
    sizes = (squares / split.split.copies).sqrt()
    onto.zero_()
    rows = split.joined(gradient)
    for tile, place, size in zip(tiles, places, sizes, strict=True):
        if split.keeps(tile.number):
            name = statistics_key(piece.place, tile.number)
            _turn(onto[place], rows[place].to(onto.dtype), size, state, name, renews=renews)
    del rows
    direction.copy_(split.scattered(onto))


def _place_of(tile: Tile, piece: Piece) -> tuple[slice, slice]:
    """Return where a tile lies in the rows of a piece."""
    return slice(tile.rows.start - piece.first_row, tile.rows.stop - piece.first_row), tile.columns


def _turn(
    direction: Tensor, gradient: Tensor, size: Tensor, state: dict[str, Tensor], name: str, *, renews: bool
) -> None:
    """Set the direction of a tile, of this norm, given its gradient; add to its statistics."""
    _add(state, "left" + name, gradient, gradient.mT)
    _add(state, "right" + name, gradient.mT, gradient)
    for side in ("left", "right") if renews else ():
        _renew(state, f"{side}_root{name}", state[side + name])
    turned = state["left_root" + name] @ gradient @ state["right_root" + name]
    direction.copy_(turned.mul_(size / (turned.norm() + torch.finfo(turned.dtype).tiny)))


def _renew(state: dict[str, Tensor], name: str, statistics: Tensor) -> None:
    """Set a root of statistics, in place where there is one."""
    root = fourth_root_inverse(statistics)
    if name in state:
        state[name].copy_(root)
    else:
        state[name] = root


def _add(state: dict[str, Tensor], name: str, first: Tensor, second: Tensor) -> None:
    """Add a product to a statistic, which is the first such product at first."""
    if name in state:
        state[name].add_(first @ second)
    else:
        state[name] = first @ second


def fourth_root_inverse(statistics: Tensor) -> Tensor:
    """Return the symmetric [n, n] matrix to the power -1/4, eigenvalues raised by a millionth of the largest."""
    values, vectors = torch.linalg.eigh(statistics)
    raised = values.clamp(min=0) + _RAISED * values.max().clamp(min=torch.finfo(values.dtype).tiny)
    return (vectors * raised.pow(-0.25)) @ vectors.mT
