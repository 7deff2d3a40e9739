"""How a model is measured: the grid, the load, the device, the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from stagewright.planner.cores import num_cores
from stagewright.planner.errors import InvalidArgument
from stagewright.profiler.model_bench import CachePolicy, Configuration, Kind, OptimizerName
from stagewright.profiler.timing import check_budget

DTypeName = Literal["fp64", "fp32", "bf16", "fp16"]

DTYPES: Mapping[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)


@dataclass(frozen=True)
class ProfileSettings:
    """Settings of one profile, checked.

    Parameters
    ----------
    configurations : the grid.
    num_busy_ranks, num_threads : the load on CPU: ranks that work at the same time, and threads of each.
    device : as torch writes it.
    optimizer : whose step is timed.
    compiled : whether layers are compiled with torch.compile first.
    cache_policy : what a layer finds in the caches: what its neighbours left (hot), or nothing (flushed).
    budget_s : about how long measuring may take.
    """

    configurations: tuple[Configuration, ...]
    num_busy_ranks: int = 1
    num_threads: int = 1
    device: str = "cpu"
    dtype: DTypeName = "fp32"
    optimizer: OptimizerName = "adamw"
    compiled: bool = False
    cache_policy: CachePolicy = "hot"
    budget_s: float = 30.0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.num_busy_ranks < 1 or self.num_threads < 1:
            raise InvalidArgument(
                f"num_busy_ranks {self.num_busy_ranks} and num_threads {self.num_threads} must be at least 1",
                field="num_busy_ranks",
            )
        if self.cache_policy not in ("hot", "flushed"):
            raise InvalidArgument(
                f"cache_policy {self.cache_policy!r} is neither hot nor flushed", field="cache_policy"
            )
        check_budget(self.budget_s)
        if self.optimizer not in OPTIMIZERS:
            raise InvalidArgument(f"optimizer {self.optimizer!r} is none of {', '.join(OPTIMIZERS)}", field="optimizer")
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}", field="dtype")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of measurement; a compiled model's backward cannot be split or recomputed from outside."""
        return ("memory", "step") if self.compiled else ("memory", "step", "split", "full", "selective")

    @property
    def torch_device(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of parameters and activations."""
        return DTYPES[self.dtype]

    @property
    def oversubscribed(self) -> bool:
        """Whether the run will have more threads than cores, so that ranks wait for each other's cores."""
        return self.num_busy_ranks * self.num_threads > num_cores()


def grid(
    microbatches: Sequence[int], sequence_lengths: Sequence[int], tensor_degrees: Sequence[int]
) -> tuple[Configuration, ...]:
    """Return every configuration of a grid in ascending order; raises InvalidArgument for an empty or negative axis."""
    axes = {"microbatches": microbatches, "sequence_length": sequence_lengths, "tensor_degrees": tensor_degrees}
    for name, values in axes.items():
        if not values or any(value < 1 for value in values):
            raise InvalidArgument(f"{name} must be positive numbers, they are {list(values)}", field=name)
    return tuple(
        Configuration(microbatch, length, degree)
        for degree in sorted(set(tensor_degrees))
        for length in sorted(set(sequence_lengths))
        for microbatch in sorted(set(microbatches))
    )


def device_of(choice: str) -> torch.device:
    """Return the device of `auto`, `cpu`, `cuda` or `cuda:INDEX`; raises InvalidArgument for one that is not here."""
    if choice == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(choice)
    except RuntimeError as error:
        raise InvalidArgument(f"device {choice!r} is no device", field="device", hint="auto, cpu or cuda") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"device {choice!r} cannot be profiled", field="device", hint="auto, cpu or cuda")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidArgument(
                f"device {choice!r} asked for, there is no CUDA device", field="device", hint="use cpu"
            )
        return torch.device("cuda", chosen.index or 0)
    return chosen
