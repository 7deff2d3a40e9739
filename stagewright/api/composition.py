"""The composition root: the backend that `stagewright serve` serves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from stagewright import __version__
from stagewright.api import planning_tasks
from stagewright.api.backend import Backend, CatalogEntry
from stagewright.api.names import check_request
from stagewright.api.validation import request_report
from stagewright.planner.catalog import cluster_entries, device_entries, model_entries
from stagewright.planner.schedules.registry import families

_GIB = 2.0**30


def default_backend(*, max_devices: int) -> Backend:
    """Return the planner, the simulator and the catalogue of this package."""
    return Backend(
        solve=planning_tasks.solve,
        simulate=planning_tasks.simulate,
        validate=planning_tasks.validate,
        check=partial(check_request, max_devices=max_devices),
        review=partial(request_report, max_devices=max_devices),
        catalog={"gpus": _gpus, "models": _models, "clusters": _clusters, "schedules": _schedules},
        prepare=planning_tasks.prepare,
        versions={"stagewright": __version__},
    )


def _gpus() -> Sequence[CatalogEntry]:
    return [
        {
            "name": entry.name,
            "summary": f"{entry.device.memory_bytes / _GIB:.0f} GiB",
            "memory_bytes": entry.device.memory_bytes,
            "memory_bytes_per_s": entry.device.memory_bytes_per_s,
            "flops": dict(entry.device.flops),
            "devices_per_node": entry.devices_per_node,
            "reference": entry.device.reference,
        }
        for entry in device_entries()
    ]


def _models() -> Sequence[CatalogEntry]:
    return [
        {"name": entry.name, "summary": entry.published, "parameters": entry.parameters, "reference": entry.reference}
        for entry in model_entries()
    ]


def _clusters() -> Sequence[CatalogEntry]:
    return [
        {
            "name": entry.name,
            "summary": " + ".join(f"{entry.nodes} x {group.devices_per_node} {group.device}" for group in entry.groups),
            "aliases": list(entry.aliases),
            "reference": entry.reference,
        }
        for entry in cluster_entries()
    ]


def _schedules() -> Sequence[CatalogEntry]:
    return [
        {
            "name": family.name,
            "summary": family.paper,
            "aliases": list(family.aliases),
            "synchronous": family.synchronous,
            "split_backward": family.split_backward,
            "constraint": family.constraint,
        }
        for family in families()
    ]
