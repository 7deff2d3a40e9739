"""TemplateSet: pipelines for every node count, and how they cover a cluster whatever nodes are lost."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from stagewright.planner.documents.document import Count, Document, Index, Name, Part, Seconds
from stagewright.planner.documents.plan import Plan


class Template(Part):
    """The best pipeline on a number of nodes: one model replica.

    Parameters
    ----------
    first_s, each_s : a pipeline with T microbatches takes first_s + T each_s, reduction between pipelines apart; fitted
        at two counts beyond its depth.
    """

    num_nodes: Count
    first_s: Seconds
    each_s: Seconds
    plan: Plan


class Cover(Part):
    """Pipelines on the nodes that are left.

    Parameters
    ----------
    num_nodes : nodes that are left.
    pipelines : nodes of each pipeline, descending; their sum is less than `num_nodes` only where templates cannot use all.
    microbatches : of each pipeline; they add up to the global batch.
    step_time_s : simulated step of the slowest pipeline, and the reduction between them.
    tolerates : nodes that may be lost at once with a replica of every layer left: pipelines - 1.
    """

    num_nodes: Count
    pipelines: Annotated[tuple[Count, ...], Field(min_length=1)]
    microbatches: tuple[Count, ...]
    step_time_s: Seconds
    tolerates: Index


class TemplateSet(Document):
    """Templates for consecutive node counts, and the fastest cover of every node count.

    Parameters
    ----------
    tolerate : f, the nodes that may be lost at once.
    least_nodes : n0, the fewest nodes that hold a replica.
    covers : for every node count from the cluster's down to n0.
    losses_checked : ways to lose at most f nodes of the full cover; each leaves a whole replica and has a cover.
    """

    document_name: ClassVar[str] = "templates"

    model: Name
    cluster: Name
    global_batch: Count
    microbatch: Count
    tolerate: Index
    least_nodes: Count
    templates: tuple[Template, ...]
    covers: tuple[Cover, ...]
    losses_checked: Index
