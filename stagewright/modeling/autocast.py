"""Mixed precision: parameters, gradients and optimizer states stay as they are, matrix products run in fewer bits.

Each forward of a segment runs under torch's autocast, which casts the operands of matrix products and of attention and leaves
sums, norms and the loss in the parameters' precision. What the backward needs was cast in the forward; recomputation casts
again. Gradients are cast back before they are added, so microbatches and replicas are summed in the parameters' precision.

Paper: Micikevicius et al., Mixed precision training, ICLR 2018 (master weights; bf16 needs no loss scaling).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stagewright.modeling.batch import Batch
from stagewright.modeling.chain import Executor, LayerChain, Values


@dataclass(frozen=True)
class AutocastExecutor:
    """Runs another executor's layers under autocast."""

    executor: Executor
    device_type: str
    dtype: torch.dtype

    def run(
        self, indices: tuple[int, ...], wanted: tuple[int, ...], batch: Batch, received: Values, seed: int | None
    ) -> dict[int, tuple[Tensor, ...]]:
        """Return the values of the layers `wanted`, after running the layers `indices`."""
        with torch.autocast(self.device_type, self.dtype):
            return self.executor.run(indices, wanted, batch, received, seed)


def with_autocast(chain: LayerChain, dtype: torch.dtype | None, device: torch.device) -> LayerChain:
    """Return the chain, its layers running under autocast; with None, the chain itself."""
    return chain if dtype is None else replace(chain, executor=AutocastExecutor(chain.executor, device.type, dtype))


def in_autocast_type(value: Tensor) -> Tensor:
    """Return a value in the type that autocast gives the operands of matrix products; itself outside of autocast."""
    device_type = value.device.type
    if device_type == "meta":  # which has no autocast: only shapes are asked for
        return value
    return value.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else value
