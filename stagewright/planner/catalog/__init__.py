"""Devices, clusters and models shipped as data, and the names under which commands take them."""

from stagewright.planner.catalog.clusters import cluster_entries, resolve_cluster
from stagewright.planner.catalog.devices import device_entries, device_entry
from stagewright.planner.catalog.models import model_entries, resolve_model

__all__ = ["cluster_entries", "device_entries", "device_entry", "model_entries", "resolve_cluster", "resolve_model"]
