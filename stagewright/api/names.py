"""What the names in a request stand for, and whether its parts fit together: quick, and without the solver.

A name is a name here and never a path: the command line reads files, the service does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stagewright.api.requests import model_name
from stagewright.planner.catalog import cluster_entries, model_entries, resolve_cluster
from stagewright.planner.catalog.data_file import shortened, suggestion
from stagewright.planner.documents import Cluster, ModelProfile
from stagewright.planner.documents.request import PlanRequest
from stagewright.planner.errors import InvalidArgument, InvalidDocument, StagewrightError
from stagewright.planner.models import profile_from_config
from stagewright.planner.schedules.registry import family
from stagewright.planner.search.space import check_pins


def profile_of(model: object) -> ModelProfile:
    """Return the profile that a request's model stands for; raises StagewrightError for an unknown or wrong one."""
    if isinstance(model, ModelProfile):
        return model
    if isinstance(model, Mapping):
        try:
            return profile_from_config(model, model_name(model), source="model")
        except StagewrightError as error:
            field = f"model.{error.field}" if error.field else "model"
            raise InvalidDocument(error.message, field=field, hint=error.hint) from error
    wanted = str(model).strip().lower()
    known = {entry.name: entry for entry in model_entries()}
    if wanted in known:
        return known[wanted].profile()
    raise InvalidArgument(
        f"there is no model {str(model)[:80]!r}",
        field="model",
        hint=f"{suggestion(wanted, known)}known: {shortened(list(known))}; or send a config object or a ModelProfile",
    )


def cluster_of(cluster: object) -> Cluster:
    """Return the cluster that a request's cluster stands for; raises StagewrightError for an unknown or wrong one."""
    if isinstance(cluster, Cluster):
        return cluster
    text = str(cluster).strip()
    if "/" in text or text.endswith((".json", ".yaml", ".yml")) or Path(text).is_file():
        names = [entry.name for entry in cluster_entries()]
        raise InvalidArgument(
            f"cluster {text[:80]!r} names a file, which this service does not read",
            field="cluster",
            hint=f"send the Cluster itself, DEVICE:PER_NODExNODES, or one of {shortened(names)}",
        )
    return resolve_cluster(text)


def check_request(request: PlanRequest, *, max_devices: int) -> None:
    """Raise StagewrightError, its field a path in the request, for names that mean nothing and parts that do not fit."""
    profile, cluster = profile_of(request.model), cluster_of(request.cluster)
    check_fit(request, profile, cluster, max_devices=max_devices)


def check_fit(request: PlanRequest, profile: ModelProfile, cluster: Cluster, *, max_devices: int) -> None:
    """Raise StagewrightError when the request asks for more than there is, or pins what contradicts itself."""
    if cluster.num_devices > max_devices:
        raise InvalidArgument(
            f"cluster {cluster.name} has {cluster.num_devices} devices, this server plans for at most {max_devices}",
            field="cluster",
            hint="the server's setting STAGEWRIGHT_MAX_DEVICES raises it",
        )
    devices = request.devices or cluster.num_devices
    if devices > cluster.num_devices:
        raise InvalidArgument(
            f"{devices} devices were asked for, cluster {cluster.name} has {cluster.num_devices}",
            field="devices",
            hint=f"give a number from 1 to {cluster.num_devices}",
        )
    space = request.job.space
    try:
        for name in (*space.schedules, *([] if space.pins.schedule is None else [space.pins.schedule])):
            family(name)
        check_pins(profile, request.job, devices)
    except StagewrightError as error:
        field = "space.pins" if error.field in (None, "schedule") else error.field
        raise InvalidArgument(error.message, field=f"job.{field}", hint=error.hint) from error
