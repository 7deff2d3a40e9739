"""What the service stands on, as one value: the composition root names the real functions, a test names its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from stagewright.api.resources import ValidationReport
from stagewright.api.tasks import TaskFunction
from stagewright.planner.documents.request import PlanRequest

CatalogEntry = Mapping[str, object]


@dataclass(frozen=True)
class Backend:
    """The functions behind the routes.

    Parameters
    ----------
    solve : in a solver process, from a PlanRequest to a PlanOutcome, both as JSON.
    simulate : in the desk's process, from a SimulationRequest to the prediction and the timeline.
    validate : in the desk's process, from a ValidationRequest that holds a plan to its violations.
    check : in the server, raises StagewrightError for a request whose names mean nothing; must be quick.
    review : in the server, all that is wrong with a request as parsed JSON; must be quick.
    catalog : by name (gpus, models, clusters, schedules), the entries that pickers show.
    prepare : in each process before its first task, so that no plan's deadline pays for imports and compilation.
    versions : what an answer depends on besides the request; part of the cache's key.
    """

    solve: TaskFunction
    simulate: TaskFunction
    validate: TaskFunction
    check: Callable[[PlanRequest], None]
    review: Callable[[object], ValidationReport]
    catalog: Mapping[str, Callable[[], Sequence[CatalogEntry]]]
    prepare: Callable[[], None] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
