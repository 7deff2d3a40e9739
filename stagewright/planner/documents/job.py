"""TrainingJob: what is to be trained, for what objective, and in which space the planner may search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from stagewright.planner.documents.document import Bytes, Count, Document, Name, Part, Seconds
from stagewright.planner.documents.profile import Recompute
from stagewright.planner.errors import InvalidArgument

Precision = Literal["fp64", "fp32", "bf16", "fp16", "fp8"]
MASTER_BYTES = 4.0
Objective = Literal["step-time", "tokens-per-dollar", "fewest-devices", "min-max-memory", "frontier"]

OptimizerName = Literal["adamw", "adam", "sgd", "sgd-momentum", "muon", "shampoo", "custom"]

# Numbers of state for each parameter beside its master weight; Shampoo's L, R and their roots are four (`cost.matrix_optimizer`).
_MOMENTS: Mapping[str, int] = {"adamw": 2, "adam": 2, "sgd": 0, "sgd-momentum": 1, "muon": 1, "shampoo": 6}
_ELEMENT_BYTES: Mapping[str, int] = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


def element_bytes(precision: str) -> int:
    """Return the bytes of one element of a dtype."""
    return _ELEMENT_BYTES[precision]


class Optimizer(Part):
    """Bytes that each trainable parameter needs, by class; `state` holds master weights and moments."""

    name: OptimizerName = "adamw"
    parameter_bytes: Bytes
    gradient_bytes: Bytes
    state_bytes: Bytes

    @classmethod
    def standard(cls, name: OptimizerName, precision: str) -> Optimizer:
        """Return the usual bytes: in mixed precision, fp32 master weights and moments beside 2-byte weights and gradients.

        Raises InvalidArgument for `custom`, whose bytes are the user's.
        """
        element = element_bytes(precision)
        if name not in _MOMENTS:
            raise InvalidArgument(
                f"optimizer {name!r} has no usual bytes", field="optimizer", hint="known: " + ", ".join(_MOMENTS)
            )
        moments = _MOMENTS[name]
        if element >= 4:
            return cls(name=name, parameter_bytes=element, gradient_bytes=element, state_bytes=moments * element)
        return cls(name=name, parameter_bytes=2, gradient_bytes=2, state_bytes=4 + 4 * moments)

    @property
    def has_masters(self) -> bool:
        """Whether weights are narrower than 4 bytes, so that what is stepped are masters of theirs."""
        return self.parameter_bytes < MASTER_BYTES

    @property
    def stepped_bytes(self) -> float:
        """Bytes of a number of what is stepped: of a master where there are some, else of the weight."""
        return max(MASTER_BYTES, self.parameter_bytes)

    @property
    def gathered_bytes(self) -> float:
        """Bytes of each parameter's update that replicas gather beside its weight where ZeRO cuts matrices: bf16, or fp64."""
        if self.name != "muon":
            return 0.0
        return 8.0 if self.parameter_bytes == 8 else 2.0


class Pins(Part):
    """Values the plan must have; a field left out is free."""

    tp: Count | None = None
    pp: Count | None = None
    dp: Count | None = None
    cp: Count | None = None
    ep: Count | None = None
    etp: Count | None = None
    sp: Literal["on", "off"] | None = None
    vocab_parallel: Literal["on", "off"] | None = None
    zero: Annotated[int, Field(ge=0, le=3)] | None = None
    microbatch: Count | None = None
    chunks: Count | None = None
    schedule: Name | None = None
    recompute: Recompute | None = None


EqualName = Literal["tp", "cp", "dp", "pp", "ep", "etp", "microbatch"]
EQUAL_NAMES: tuple[str, ...] = get_args(EqualName)
PIN_NAMES = tuple(Pins.model_fields)


class Forbid(Part):
    """A value the plan must not have; without `value`, anything but the trivial one (1, off, none, 0)."""

    name: Name
    value: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name not in PIN_NAMES:
            raise ValueError(f"name {self.name!r} is none of {', '.join(PIN_NAMES)}")
        return self


class SearchSpace(Part):
    """The declared space: what the planner may choose from, and so what its certificate speaks of.

    Parameters
    ----------
    schedules : families of the registry; empty for every synchronous one the executor can run.
    pins, forbids : values that must or must not be.
    ties : groups of layer names that must share a stage.
    equal : pairs of degrees that must have the same value.
    max_microbatch, max_chunks : largest microbatch (samples) and virtual stages a rank.
    zero, recompute : levels to consider.
    per_stage_degrees : stages may differ in their degrees.
    memory_headroom : share of the device memory that stays free.
    target : a format whose limits cut the space.
    """

    schedules: tuple[Name, ...] = ()
    pins: Pins = Pins()
    forbids: tuple[Forbid, ...] = ()
    ties: tuple[tuple[Name, ...], ...] = ()
    equal: tuple[tuple[EqualName, EqualName], ...] = ()
    max_microbatch: Count = 64
    max_chunks: Count = 8
    zero: tuple[Annotated[int, Field(ge=0, le=3)], ...] = (0, 1, 2, 3)
    recompute: tuple[Recompute, ...] = tuple(Recompute)
    per_stage_degrees: bool = False
    synchronous_only: bool = True
    memory_headroom: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target: Name | None = None


class TrainingJob(Document):
    """One training job; only the batch and the sequence length have no default."""

    document_name: ClassVar[str] = "job"

    global_batch: Count
    sequence_length: Count
    precision: Precision = "bf16"
    optimizer: Optimizer = Field(default_factory=lambda data: Optimizer.standard("adamw", data["precision"]))
    objective: Objective = "step-time"
    step_deadline_s: Seconds | None = None
    expert_imbalance: Annotated[float, Field(ge=1)] = 1.0
    space: SearchSpace = SearchSpace()
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    gap: Annotated[float, Field(ge=0)] = 0.01
