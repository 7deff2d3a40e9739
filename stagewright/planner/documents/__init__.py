"""The four durable documents: ModelProfile, Cluster, TrainingJob, Plan."""

from stagewright.planner.documents.cluster import Cluster, Device, LinkLevel, LinkSegment, NodeGroup
from stagewright.planner.documents.document import Document, Part
from stagewright.planner.documents.job import Forbid, Optimizer, Pins, SearchSpace, TrainingJob
from stagewright.planner.documents.operator import Architecture, Operator
from stagewright.planner.documents.plan import (
    Certificate,
    Degrees,
    Expectation,
    MemoryItems,
    Plan,
    Prediction,
    RankMapping,
    RecomputeRun,
    ScheduleSpec,
    StagePlan,
)
from stagewright.planner.documents.profile import (
    Collective,
    ConfigurationCost,
    Edge,
    Jitter,
    LayerClass,
    LayerRun,
    ModelProfile,
    Pedigree,
    Recompute,
    Source,
    TiedWeight,
)

__all__ = [
    "Architecture",
    "Certificate",
    "Cluster",
    "Collective",
    "ConfigurationCost",
    "Degrees",
    "Device",
    "Document",
    "Edge",
    "Expectation",
    "Forbid",
    "Jitter",
    "LayerClass",
    "LayerRun",
    "LinkLevel",
    "LinkSegment",
    "MemoryItems",
    "ModelProfile",
    "NodeGroup",
    "Operator",
    "Optimizer",
    "Part",
    "Pedigree",
    "Pins",
    "Plan",
    "Prediction",
    "RankMapping",
    "Recompute",
    "RecomputeRun",
    "ScheduleSpec",
    "SearchSpace",
    "Source",
    "StagePlan",
    "TiedWeight",
    "TrainingJob",
]
