"""Costs of layers, communication and memory under parallel degrees."""

from stagewright.planner.cost.cost_model import Boundary, CostModel, ReplicaTable
from stagewright.planner.cost.layer_table import LEVELS, LayerTable
from stagewright.planner.cost.options import CostOptions

__all__ = ["LEVELS", "Boundary", "CostModel", "CostOptions", "LayerTable", "ReplicaTable"]
