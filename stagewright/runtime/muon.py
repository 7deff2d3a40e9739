"""Muon: every block's matrix moves along its momentum made orthogonal; all else along its momentum made of one size.

With gradient G, momentum M and the look-ahead U of Nesterov,

    M <- mu M + G,  U = G + mu M
    matrix of a block   O = NS(U) 0.2 sqrt(max(m, n))        m x n; a stack of matrices one by one
    any other tensor    O = 0.2 U / (rms(U) + 1e-8)
    W <- (1 - lr decay) W - lr O

where NS are five Newton-Schulz iterations X <- a X + (b A + c A A) X, A = X X^T, from X = U / |U|, with singular values near 1
behind them. Every update has a root mean square of about 0.2, AdamW's, so that one learning rate serves all. One moment a
parameter, as the ledger holds: embeddings, heads, norms and biases take the normalised momentum of norm-constrained steps
in place of AdamW, which would hold two.

Newton-Schulz runs in bf16, on processors in fp32, and in fp64 where the weights are fp64. Under ZeRO each rank gathers U in
bf16, or in fp64, and makes those matrices orthogonal of which it owns elements; it steps its own with its own full-width
momentum. What tensor parallelism has split, or that of experts, each rank of the group gathers in the same type, and makes
whole matrices orthogonal as its neighbours do; of a vocabulary that is split only the sum of squares goes over the group.

Papers: Jordan et al., Muon, 2024; Liu et al., Muon is Scalable for LLM Training, 2025; Pethick et al., Training Deep Learning
Models with Norm-Constrained LMOs, ICML 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stagewright.planner.cost.matrix_optimizer import NEWTON_SCHULZ_STEPS
from stagewright.runtime.matrix_layout import Layout, Update
from stagewright.runtime.matrix_optimizer import MatrixOptimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_RMS = 0.2
_EPSILON = 1e-8


class Muon(MatrixOptimizer):
    """Steps parameters on momentum made orthogonal; weight decay is decoupled."""

    def _step_one(
        self, parameter: nn.Parameter, gradient: Tensor, layout: Layout, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        ahead = _look_ahead(gradient, state["momentum_buffer"], layout, group["momentum"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        narrow = parameter.dtype if parameter.dtype == torch.float64 else torch.bfloat16
        update = Update(parameter.numel(), parameter.device, narrow, lambda part: ahead(part).to(narrow))
        for index, whole in layout.gathered(update):
            _move(parameter, ahead, layout, index, whole, group["lr"])
            del whole  # before the next one comes


def _look_ahead(gradient: Tensor, momentum: Tensor, layout: Layout, factor: float) -> Callable[[slice], Tensor]:
    """Add the gradient to the momentum; return what gives the look-ahead at some elements, in the momentum's type.

    It is made where the gradient lies, which nothing reads behind a step; of narrower gradients piece by piece when it is asked for.
    """
    if gradient.dtype == momentum.dtype:
        momentum.mul_(factor).add_(gradient)
        made = gradient.add_(momentum, alpha=factor).reshape(-1)
        return lambda part: made[part]
    flat, moved = gradient.reshape(-1), momentum.view(-1)
    for piece in layout.pieces:
        moved[piece.part].mul_(factor).add_(flat[piece.part].to(momentum.dtype))
    return lambda part: flat[part].to(momentum.dtype).add_(moved[part], alpha=factor)


def _move(
    parameter: Tensor,
    ahead: Callable[[slice], Tensor],
    layout: Layout,
    index: int,
    whole: Tensor,
    learning_rate: float,
) -> None:
    """Move one tensor of a parameter against its direction, of root mean square 0.2."""
    piece = layout.pieces[index]
    if piece.is_matrix:
        direction = layout.own(index, orthogonal(whole.view(piece.shape))).to(parameter.dtype)
        size = _RMS * max(piece.shape[-2:]) ** 0.5
    else:
        size = _RMS / (layout.mean_square(index, whole, parameter.dtype) ** 0.5 + _EPSILON)
        direction = ahead(piece.part)
    target = parameter[piece.part] if parameter.dim() == 1 else parameter
    target.add_(direction.view_as(target), alpha=-learning_rate * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return the matrix [..., m, n] with its singular values brought near 1; zeros stay zeros.

    A processor's products in bf16 hold their sums in what the machine pleases: there a narrow matrix is made, and returned, in fp32.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    if matrix.device.type == "cpu":
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + torch.finfo(x.dtype).tiny)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
