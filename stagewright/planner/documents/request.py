"""PlanRequest: the question `plan` and `POST /v1/plans` ask, holding the other documents or their names."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.document import Count, Document, Name
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.profile import ModelProfile


class PlanRequest(Document):
    """One planning question.

    Parameters
    ----------
    model : a catalogue name, a Hugging Face config object, or a ModelProfile.
    cluster : shorthand such as `h100-sxm:8x16`, a catalogue name, or a Cluster.
    devices : use at most this many of the cluster; all when None.
    deadline_s : seconds from acceptance until the best plan so far is the answer.
    top : how many alternatives to return.
    labels : free text for finding the plan again.
    """

    document_name: ClassVar[str] = "request"

    model: Annotated[Name | ModelProfile | dict[str, object], Field(union_mode="left_to_right")]
    cluster: Annotated[Name | Cluster, Field(union_mode="left_to_right")]
    job: TrainingJob
    planner: Name = "exact"
    devices: Count | None = None
    deadline_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] | None = None
    top: Annotated[int, Field(ge=0, le=100)] = 5
    labels: dict[Name, Annotated[str, Field(max_length=200)]] = {}
