"""One algebra of split, replicated and partial tensors; collectives, propagation and strategy choice stand on it."""

from stagewright.planner.sharding.layout import PARTIAL, REPLICATED, Layout, Mesh, Placement, split
from stagewright.planner.sharding.operator_graph import GraphBuilder, OperatorGraph, with_backward
from stagewright.planner.sharding.propagation import partition, propagate
from stagewright.planner.sharding.redistribution import redistribute
from stagewright.planner.sharding.spmd import SpmdProgram, lower

__all__ = [
    "PARTIAL",
    "REPLICATED",
    "GraphBuilder",
    "Layout",
    "Mesh",
    "OperatorGraph",
    "Placement",
    "SpmdProgram",
    "lower",
    "partition",
    "propagate",
    "redistribute",
    "split",
    "with_backward",
]
