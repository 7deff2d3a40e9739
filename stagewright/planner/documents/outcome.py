"""What a planning run answers: the document of `plan --json`, and the progress it reports on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stagewright.planner.documents.document import Bytes, Count, Document, Index, Name, Part, Seconds
from stagewright.planner.documents.migration import Migration
from stagewright.planner.documents.plan import MemoryItems, Plan

Status = Literal["optimal", "within_gap", "feasible", "infeasible", "no_solution"]


class Alternative(Part):
    """A runner-up: its choice in words, its plan, and what it costs."""

    summary: str
    step_time_s: Seconds
    peak_memory_bytes: Bytes
    plan: Plan


class Shortfall(Part):
    """One pipeline rank that does not fit."""

    pipeline_rank: Index
    needed_bytes: Bytes
    available_bytes: Bytes
    short_bytes: Bytes
    items: MemoryItems


class Relaxation(Part):
    """A smallest change of the question that has an answer."""

    change: str
    step_time_s: Seconds | None = None


class Diagnosis(Part):
    """Why nothing fits, the nearest plan, and what would fit."""

    message: str
    binding: Name
    nearest: Plan | None = None
    shortfalls: tuple[Shortfall, ...] = ()
    relaxations: tuple[Relaxation, ...] = ()


class FrontierPoint(Part):
    """A plan that no other one beats in devices, step and peak memory at once.

    Parameters
    ----------
    bound_s : no plan on as many devices with less peak memory than the point before is faster.
    """

    num_devices: Count
    step_time_s: Seconds
    peak_memory_bytes: Bytes
    bound_s: Seconds
    plan: Plan


class PlanOutcome(Document):
    """The answer of a planner.

    Parameters
    ----------
    objective_s, bound_s : step of the plan, and a proved bound on the step of every plan; None where the objective is
        another one.
    objective_name, objective, bound : the job's objective, its value for the plan, and the proved limit of it: a lower
        one, for tokens per dollar an upper one.
    gap : how far the objective is from its bound, relative to the better of both.
    frontier : for the frontier objective, its points by devices and memory.
    migration : for a plan that follows another one, what moves where.
    own_objective : what the planner itself minimised, at its plan; None where that is the simulated step.
    """

    document_name: ClassVar[str] = "outcome"

    status: Status
    plan: Plan | None
    objective_s: Annotated[float, Field(ge=0)] | None
    bound_s: Annotated[float, Field(ge=0)] | None
    gap: Annotated[float, Field(ge=0)] | None
    objective_name: Name = "step_time_s"
    objective: float | None = None
    bound: float | None = None
    own_objective: Annotated[float, Field(ge=0)] | None = None
    candidates: Index
    evaluated: Index
    simulated: Index
    wall_s: Seconds
    termination: Literal["optimal", "gap", "time_limit", "cancelled"] | None = None
    alternatives: tuple[Alternative, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()
    migration: Migration | None = None
    diagnosis: Diagnosis | None = None


@dataclass(frozen=True)
class Progress:
    """One progress report: the phase, how far it is, and the best known so far."""

    phase: str
    done: int
    total: int
    incumbent_s: float | None = None
    bound_s: float | None = None

    @property
    def gap(self) -> float | None:
        """Incumbent over bound, less one; None before both exist."""
        if self.incumbent_s is None or not self.bound_s:
            return None
        return max(0.0, self.incumbent_s / self.bound_s - 1.0)
