"""The network of several nodes, measured over the groups that training uses: one level inside nodes, one between them.

Every rank of a job takes part, started by torchrun (or anything that sets RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE and the rendezvous). The groups of a level are measured at the same time, as training uses them:

- inside: the ranks of each node;
- between: the ranks with the same place in every node, so that all devices of a node share its way out.

    4 ranks, 2 a node        inside: {0, 1} {2, 3}        between: {0, 2} {1, 3}

A level's number for an operation and size is that of its slowest rank; sizes and bus bandwidth follow nccl-tests
(`network`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from stagewright.planner.documents import Cluster, LinkLevel, NodeGroup
from stagewright.planner.errors import InvalidArgument, RunFailed
from stagewright.profiler.discover import device_of_ranks, discovered_dtypes, measure_rank
from stagewright.profiler.network import OPERATIONS, QUICK_SIZES_BYTES, NetworkProfile, network_profile_of, sweep
from stagewright.profiler.ranks import RankContext, ReportsProgress, run_ranks
from stagewright.profiler.timing import check_budget

INSIDE, BETWEEN = "node", "network"


@dataclass(frozen=True)
class Job:
    """This rank's place in a job of equal nodes."""

    rank: int
    num_ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        """Refuse nodes of unequal size."""
        if self.ranks_per_node < 1 or self.num_ranks % self.ranks_per_node:
            raise InvalidArgument(
                f"{self.num_ranks} ranks do not make nodes of {self.ranks_per_node}",
                field="ranks_per_node",
                hint="start as many ranks on every node",
            )

    @property
    def levels(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Return the groups of each level that joins at least two ranks, innermost first."""
        size, nodes = self.ranks_per_node, self.num_ranks // self.ranks_per_node
        inside = tuple(tuple(range(node * size, (node + 1) * size)) for node in range(nodes))
        between = tuple(tuple(range(place, self.num_ranks, size)) for place in range(size))
        return {name: groups for name, groups in ((INSIDE, inside), (BETWEEN, between)) if len(groups[0]) > 1}


def job_of(environment: Mapping[str, str]) -> Job | None:
    """Return the job that started this process, None when none of at least two ranks did."""
    if int(environment.get("WORLD_SIZE", "1")) < 2 or "RANK" not in environment:
        return None
    size = int(environment["WORLD_SIZE"])
    return Job(int(environment["RANK"]), size, int(environment.get("LOCAL_WORLD_SIZE", size)))


def profile_job(
    job: Job, *, device: str = "auto", budget_s: float = 12.0, progress: ReportsProgress | None = None
) -> Cluster | None:
    """Return the job's cluster on rank 0, None on the others; every rank of the job calls this."""
    check_budget(budget_s)
    kind: Literal["cpu", "cuda"] = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    report = progress if progress is not None and job.rank == 0 else _silent
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        local_rank = job.rank % job.ranks_per_node
        context = RankContext(local_rank, job.num_ranks, "", report, threading.Event())
        rates = measure_rank(context, kind, discovered_dtypes(kind), budget_s / 3)
        levels = _sweep_levels(job, OPERATIONS, QUICK_SIZES_BYTES, kind, budget_s / 2, report)
        gathered: list[dict[str, dict[str, object]]] = [{} for _ in range(job.num_ranks)]
        dist.all_gather_object(gathered, {"rates": rates, "levels": levels})
    finally:
        dist.destroy_process_group()
    if job.rank:
        return None
    profiles = profiles_of(job, [row["levels"] for row in gathered])
    links = links_of(job, profiles)
    measured = device_of_ranks(kind, job.ranks_per_node, [row["rates"] for row in gathered])
    group = NodeGroup(
        name="local",
        device=measured,
        num_nodes=job.num_ranks // job.ranks_per_node,
        devices_per_node=job.ranks_per_node,
        links=links,
    )
    return Cluster(name="local", groups=(group,))


def profile_local_levels(
    num_ranks: int, ranks_per_node: int, *, sizes_bytes: Sequence[int] = QUICK_SIZES_BYTES, budget_s: float = 6.0
) -> dict[str, NetworkProfile]:
    """Return the levels' profiles of local gloo ranks that stand for nodes of `ranks_per_node`."""
    arguments = {"ranks_per_node": ranks_per_node, "sizes_bytes": list(sizes_bytes), "budget_s": budget_s}
    rows = run_ranks(
        "stagewright.profiler.network_groups:sweep_local_rank", num_ranks, arguments, timeout_s=60 + 10 * budget_s
    )
    return profiles_of(Job(0, num_ranks, ranks_per_node), [row for row in rows if isinstance(row, dict)])


def sweep_local_rank(
    context: RankContext, ranks_per_node: int, sizes_bytes: Sequence[int], budget_s: float
) -> dict[str, object]:
    """Measure every level on one local rank; the parent starts all of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=context.rendezvous, rank=context.rank, world_size=context.num_ranks)
    try:
        job = Job(context.rank, context.num_ranks, ranks_per_node)
        return _sweep_levels(job, OPERATIONS, sizes_bytes, "cpu", budget_s, context.report)
    finally:
        dist.destroy_process_group()


def profiles_of(job: Job, rows: Sequence[Mapping[str, object]]) -> dict[str, NetworkProfile]:
    """Return the profile of each level from all ranks' raw numbers; the slowest rank of any group counts."""
    if len(rows) != job.num_ranks:
        raise RunFailed(f"{len(rows)} of {job.num_ranks} ranks measured the network")
    return {
        level: network_profile_of([row[level] for row in rows], len(groups[0])) for level, groups in job.levels.items()
    }


def links_of(job: Job, profiles: Mapping[str, NetworkProfile]) -> tuple[LinkLevel, ...]:
    """Return the cluster's levels; a job of one device a node has the network alone."""
    joined = {INSIDE: job.ranks_per_node, BETWEEN: job.num_ranks}
    return tuple(profile.level(name, joined[name]) for name, profile in profiles.items())


def _sweep_levels(
    job: Job, operations: Sequence[str], sizes_bytes: Sequence[int], kind: str, budget_s: float, report: ReportsProgress
) -> dict[str, object]:
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    found: dict[str, object] = {}
    for level, groups in job.levels.items():
        members, _ = dist.new_subgroups_by_enumeration([list(group) for group in groups])
        dist.barrier()
        share_s = budget_s / len(job.levels)
        found[level] = sweep(
            operations, sizes_bytes, device=device, budget_s=share_s, overlap=True, progress=report, group=members
        )
        dist.barrier()
    return found


def _silent(phase: str, done: int, total: int) -> None:
    """Report nothing."""
