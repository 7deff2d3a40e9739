"""Explanation: why a plan is as fast as it is, what binds it, what came next, and what a user's own choice would cost."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stagewright.planner.documents.document import Bytes, Document, Index, Name, Part, Seconds
from stagewright.planner.documents.outcome import Diagnosis
from stagewright.planner.documents.plan import MemoryItems, Plan


class PathShares(Part):
    """Where the seconds of a step go, seen from the busiest pipeline rank; the parts sum to the step.

    Parameters
    ----------
    compute_s : the rank's own work.
    bubble_s : it is idle and the critical path is in the work of other ranks: filling, draining, waiting.
    communication_s : it is idle and the critical path is in messages, or waits for their links.
    reduction_s : its gradient reduction and optimizer behind the last action.
    overhead_s : what a step costs beside its actions.
    """

    compute_s: Seconds
    bubble_s: Seconds
    communication_s: Seconds
    reduction_s: Seconds
    overhead_s: Seconds


class RankLoad(Part):
    """One pipeline rank: its compute on the critical path, its work, and its memory against what its devices have."""

    pipeline_rank: Index
    path_s: Seconds
    busy_s: Seconds
    peak_bytes: Bytes
    available_bytes: Bytes
    largest_item: Name
    items: MemoryItems


class Binding(Part):
    """The constraint that keeps the step from being shorter.

    Parameters
    ----------
    kind : "memory" where a search without the memory limit finds a step below the proved bound, else the largest part
        of the step.
    step_time_s : step of the best plan found without this constraint; None when it was not searched.
    """

    kind: Literal["memory", "compute", "bubble", "communication", "reduction", "overhead"]
    pipeline_rank: Index | None = None
    message: str
    step_time_s: Seconds | None = None


class RunnerUp(Part):
    """A plan that came behind: its choice in words, what it costs, and how much slower it is."""

    summary: str
    step_time_s: Seconds
    slower: float
    peak_memory_bytes: Bytes


class Comparison(Part):
    """One number of the plan beside the same number of another one."""

    name: Name
    plan: str | float | None
    other: str | float | None


class WhyNot(Part):
    """The best plan with the choices a user asks about, or why there is none.

    Parameters
    ----------
    pins : the choices, as name=value.
    slower : its step over the plan's, less one; negative when it is faster.
    comparison : both plans number by number.
    """

    pins: tuple[str, ...]
    status: Name
    plan: Plan | None = None
    step_time_s: Seconds | None = None
    bound_s: Seconds | None = None
    slower: float | None = None
    binding: Binding | None = None
    shares: PathShares | None = None
    comparison: tuple[Comparison, ...] = ()
    diagnosis: Diagnosis | None = None


class Explanation(Document):
    """What `explain` answers."""

    document_name: ClassVar[str] = "explanation"

    model: Name
    cluster: Name
    summary: str
    step_time_s: Seconds
    bound_s: Seconds | None
    gap: Annotated[float, Field(ge=0)] | None
    shares: PathShares
    ranks: tuple[RankLoad, ...]
    binding: Binding
    runners_up: tuple[RunnerUp, ...] = ()
    why_not: WhyNot | None = None
