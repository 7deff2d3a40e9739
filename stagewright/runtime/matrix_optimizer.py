"""Optimizers of whole matrices, parameter by parameter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stagewright.runtime.matrix_layout import Layout


class MatrixOptimizer(torch.optim.Optimizer):
    """Steps parameters of which it is told the tensors inside.

    Parameters
    ----------
    parameters : each with its layout; all ranks that share a layout step at once.
    learning_rate, momentum, weight_decay : of every parameter.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[nn.Parameter, Layout]],
        *,
        learning_rate: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__(
            [parameter for parameter, _ in parameters],
            {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay},
        )
        self._layouts = {id(parameter): layout for parameter, layout in parameters}

    def layout_of(self, parameter: nn.Parameter) -> Layout:
        """Return where the tensors of a parameter lie."""
        return self._layouts[id(parameter)]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Take a step; a parameter without a gradient stays."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    layout = self.layout_of(parameter)
                    self._step_one(parameter, parameter.grad, layout, self.state[parameter], group)

    @abstractmethod
    def _step_one(
        self, parameter: nn.Parameter, gradient: Tensor, layout: Layout, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        """Step one parameter, tensor by tensor; its state is empty at first, and its gradient may be narrower than itself."""
