"""The single-process reference: the whole model, one microbatch after another, on one device.

Weights below 32 bits have fp32 masters, as a run has them: what the optimizer steps, and what changes are told of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stagewright.modeling.batch import Batch, batch_size, slice_batch, to_device
from stagewright.modeling.block_matrices import block_matrices
from stagewright.modeling.chain import LayerChain
from stagewright.modeling.seeding import microbatch_seed
from stagewright.runtime.matrix_layout import whole_layouts
from stagewright.runtime.optimizers import OptimizerChoice, make_optimizer


@dataclass(frozen=True)
class ReferenceRun:
    """What one process computes.

    Parameters
    ----------
    gradients : gradient of the first batch's mean loss, by parameter name (tied ones once, under their first name).
    changes : weights after all steps less the weights before; empty when no step was asked for.
    losses : mean loss of each step.
    """

    gradients: dict[str, Tensor]
    changes: dict[str, Tensor]
    losses: tuple[float, ...]


def run_reference(
    chain: LayerChain,
    batches: Sequence[Batch],
    *,
    microbatch: int,
    seed: int,
    device: torch.device,
    optimizer: OptimizerChoice | None,
    clip_norm: float | None = None,
    learning_rate_factor: Callable[[int], float] | None = None,
) -> ReferenceRun:
    """Return gradients of the first batch and, with an optimizer, the change of the weights after a step on each batch.

    The model's weights are afterwards what they were before, and so are its modules' forwards.
    """
    with _own_forwards(chain.model):
        model = chain.model.to(device)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        masters = _masters(model)
        stepper = (
            None
            if optimizer is None
            else make_optimizer(optimizer, masters.values(), whole_layouts(_of_masters(block_matrices(chain), masters)))
        )
        gradients: dict[str, Tensor] = {}
        losses = []
        for step, batch in enumerate(batches if stepper is not None else batches[:1]):
            model.zero_grad(set_to_none=step == 0)  # later steps begin with zeros, as those of a run do
            losses.append(_accumulate(chain, to_device(batch, device), microbatch=microbatch, seed=seed, step=step))
            if step == 0:
                gradients = {
                    name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
                    for name, value in model.named_parameters()
                    if value.requires_grad
                }
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            if stepper is not None:
                if learning_rate_factor is not None and optimizer is not None:
                    for group in stepper.param_groups:
                        group["lr"] = optimizer.learning_rate * learning_rate_factor(step)
                _step(stepper, masters)
        model.zero_grad(set_to_none=True)
        changes = {}
        with torch.no_grad():
            for name, value in model.named_parameters():
                if stepper is not None and value.requires_grad:
                    changes[name] = masters[value].detach() - before[name]
                value.copy_(before[name])
        return ReferenceRun(gradients, changes, tuple(losses))


@contextmanager
def _own_forwards(model: nn.Module) -> Iterator[None]:
    """Let modules have their forwards back, which a segment takes over: a rank gives other ones to those without."""
    before = {module: module.__dict__.get("forward") for module in model.modules()}
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _masters(model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Return what is stepped for each parameter: itself, or a copy in fp32 of a narrower one."""
    return {
        value: nn.Parameter(value.detach().float(), requires_grad=value.requires_grad)
        if value.element_size() < 4
        else value
        for value in model.parameters()
    }


def _of_masters(parameters: Iterable[int], masters: Mapping[nn.Parameter, nn.Parameter]) -> frozenset[int]:
    """Return the ids of the masters of some parameters, which are given by id."""
    chosen = frozenset(parameters)
    return frozenset(id(master) for value, master in masters.items() if id(value) in chosen)


def _step(stepper: torch.optim.Optimizer, masters: Mapping[nn.Parameter, nn.Parameter]) -> None:
    for value, master in masters.items():
        if master is not value:
            master.grad = None if value.grad is None else value.grad.to(master.dtype)
    stepper.step()
    with torch.no_grad():
        for value, master in masters.items():
            if master is not value:
                value.copy_(master)


def _accumulate(chain: LayerChain, batch: Batch, *, microbatch: int, seed: int, step: int) -> float:
    count = batch_size(batch) // microbatch
    segment = chain.segment(0, chain.num_layers)
    total = 0.0
    for index in range(count):
        part = slice_batch(batch, index * microbatch, microbatch)
        (loss,) = segment.run(part, seed=microbatch_seed(seed, step, index))
        (loss / count).backward()
        total += float(loss.detach()) / count
    return total
