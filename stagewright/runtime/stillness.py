"""Dropout in comparisons with one process: it drops the same elements only where a rank draws for whole samples of a microbatch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from stagewright.planner.documents import Plan


def draws_as_one_process(plan: Plan) -> bool:
    """Tell whether every stage draws random numbers for the same microbatches, with whole heads, sequences and experts."""
    replicas = {stage.degrees.dp for stage in plan.stages}
    return (
        len(replicas) == 1
        and plan.schedule.num_slices == 1
        and all(
            stage.degrees.num_devices == stage.degrees.dp and stage.degrees.ep == 1 and not stage.batch_shares
            for stage in plan.stages
        )
    )


@contextmanager
def comparable(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Evaluate the model, without dropout, where ranks draw other random numbers than one process; its modes come back."""
    modes = {module: module.training for module in model.modules()}
    if not draws_as_one_process(plan):
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
