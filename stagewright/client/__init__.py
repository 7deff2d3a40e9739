"""A small typed client of the service."""

from stagewright.client.client import Client
from stagewright.client.resources import PlanPage, RemotePlan, RemoteProblem, SimulationReport, ValidationReport

__all__ = ["Client", "PlanPage", "RemotePlan", "RemoteProblem", "SimulationReport", "ValidationReport"]
