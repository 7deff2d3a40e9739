"""The second opinion: an exported schedule on torch's own pipeline runtime.

`torch.distributed.pipelining` runs a schedule that a CSV holds (formats.torch_csv) through names that are private to it;
they stand in `torch_adapter`. It takes chains of stages, each on one rank, and synchronous weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from stagewright.formats.torch_csv import torch_csv
from stagewright.planner.schedules.schedule import Schedule
from stagewright.runtime.torch_adapter import pipeline_schedule_runtime

Loss = Callable[[Tensor, Tensor], Tensor]
WeightGradients = Callable[[], Callable[[], None]]


class TorchPipeline:
    """One rank's stages under torch's runtime.

    Parameters
    ----------
    schedule : compute-only; torch lowers it itself.
    modules : this rank's stages by index.
    loss : of the last stage's output and the targets.
    device : where they run.
    weight_gradients : by stage, makes what a W action calls in place of the autograd graph's second half.
    """

    def __init__(
        self,
        schedule: Schedule,
        modules: Mapping[int, nn.Module],
        loss: Loss,
        device: torch.device,
        *,
        weight_gradients: Mapping[int, WeightGradients] | None = None,
    ) -> None:
        placement = {stage: int(rank) for stage, rank in enumerate(schedule.placement[0].tolist())}
        self._first, self._last = 0 in modules, schedule.num_stages - 1 in modules
        stages = [
            PipelineStage(
                module,
                index,
                schedule.num_stages,
                device,
                dw_builder=None if weight_gradients is None else weight_gradients[index],
            )
            for index, module in sorted(modules.items())
        ]
        for stage in stages:
            stage.stage_index_to_group_rank = placement
        with tempfile.TemporaryDirectory(prefix="stagewright-csv-") as folder:
            path = Path(folder) / "schedule.csv"
            path.write_text(torch_csv(schedule))
            self._runtime = pipeline_schedule_runtime(stages, schedule.num_microbatches, loss, placement, path)

    def step(self, inputs: Tensor, targets: Tensor) -> float | None:
        """Run one iteration on a batch, which it divides equally; returns the loss where the last stage is."""
        losses: list[Tensor] = []
        arguments = (inputs,) if self._first else ()
        told = {"target": targets, "losses": losses} if self._last else {}
        self._runtime.step(*arguments, **told)
        return float(torch.stack(losses).detach().mean()) if losses else None
