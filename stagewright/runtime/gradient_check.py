"""Are a plan's gradients and weights those of one process?

The error of a parameter is |g - g_ref| / max(|g_ref|, 1e-6 |all g_ref|) in the 2-norm; the check reports the largest.
The second term matters where a gradient is zero in theory (a key's bias) and noise in practice. Weights after k steps
are compared by the same ratio on w - w_0, of what |g - g_ref| is beyond the rounding of the weights themselves: a norm's
weight of 1 that moves by 0.003 in fp32 is told to 4e-5 of its change, however exact the steps are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stagewright.modeling.chain import LayerChain
from stagewright.runtime.worker import Worker

FLOOR = 1e-6


@dataclass(frozen=True)
class Comparison:
    """The largest error and the parameter that has it."""

    max_relative_error: float
    parameter: str
    num_parameters: int


def reference_shapes(chain: LayerChain) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the trainable parameters of the whole model; to be called before layers are dropped."""
    return {name: tuple(value.shape) for name, value in chain.model.named_parameters() if value.requires_grad}


def compare(
    worker: Worker,
    values: Mapping[str, Tensor],
    reference: Mapping[str, Tensor] | None,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    around: Mapping[str, Tensor] | None = None,
) -> Comparison:
    """Return the largest error over all ranks; every rank calls this, rank 0 with the reference.

    `values` are this rank's by the name the worker has for a parameter. Where they are changes of weights, these lie `around`
    what is given, and what their own rounding makes of a change is no error.
    """
    device = worker.settings.device
    dtype = torch.promote_types(next(iter(worker.chain.model.parameters())).dtype, torch.float32)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    flat = torch.empty(count, dtype=dtype, device=device)
    if reference is not None:
        flat = torch.cat([reference[name].reshape(-1).to(device, dtype) for name in shapes])
    dist.broadcast(flat, 0)
    expected, offset = {}, 0
    for name, shape in shapes.items():
        length = torch.Size(shape).numel()
        expected[name] = flat[offset : offset + length].view(shape)
        offset += length
    scale = float(flat.double().norm())
    names = _reference_names(worker, shapes)
    worst = (0.0, "", 0)
    for name, value in values.items():
        wanted = expected[names.get(name, name)].double()
        apart = float((value.double() - wanted).norm())
        if around is not None:
            apart = max(apart - _rounding(around[name]), 0.0)
        error = apart / max(float(wanted.norm()), FLOOR * scale, 1e-300)
        worst = (*max(worst[:2], (error if error == error else float("inf"), name)), worst[2] + 1)
    everyone: list[tuple[float, str, int]] = [worst] * dist.get_world_size()
    dist.all_gather_object(everyone, worst)
    seen = max(everyone)
    return Comparison(seen[0], seen[1], len(shapes))


def _rounding(weights: Tensor) -> float:
    """Return the 2-norm of a unit in the last place of each weight."""
    return float(weights.double().norm()) * torch.finfo(weights.dtype).eps


def _reference_names(worker: Worker, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the name that the reference has for a parameter by each of its names, where it has several."""
    alike: dict[int, list[str]] = {}
    for name, value in worker.chain.model.named_parameters(remove_duplicate=False):
        alike.setdefault(id(value), []).append(name)
    groups = [*alike.values(), *(tie.names for tie in worker.chain.ties)]
    return {name: known for names in groups for known in names if known in shapes for name in names}
