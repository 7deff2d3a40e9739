"""What the ranks of a pool run of a whole `stagewright run`: the session of one rank, as torchrun would start it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from runtime_cases import CPU, GROUPS

from stagewright.modeling.kept_memory import keep_freed_memory
from stagewright.planner.documents import ModelProfile, Plan
from stagewright.runtime import session
from stagewright.runtime.job import RunJob
from stagewright.runtime.program import program_of
from stagewright.runtime.status import StatusFile
from stagewright.runtime.torch_adapter import default_store
from stagewright.runtime.worker import Worker


def run_session(argument: tuple[str, int]) -> None:
    """Run this rank's part of the job in a directory; the number keeps its keys in the store apart from other jobs'."""
    directory, number = argument
    job = RunJob.load(Path(directory) / "job.json")
    torch.set_num_threads(job.num_threads)
    keep_freed_memory()
    plan, profile = Plan.load(job.path / "plan.json"), ModelProfile.load(job.path / "profile.json")
    schedule, evaluation = program_of(plan, profile)
    status = StatusFile(job.path / "status", dist.get_world_size())
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    store = dist.PrefixStore(f"job/{number}", default_store())
    worker = partial(Worker, groups=GROUPS)
    with patch.object(session, "default_store", lambda: store), patch.object(session, "Worker", worker):
        session.Session(job, plan, profile, schedule, evaluation, CPU, status).run()
    status.close()
