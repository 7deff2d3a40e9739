"""The process of one rank, started by torchrun: `python -m stagewright.runtime.rank JOB`.

The rank joins the process group, gives signs of life, runs the job (`session`) and ends. When anything raises, it writes
a report that names its stage and action and ends with an exit code; torchrun and the launcher end the others.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

from stagewright.runtime.failure import CONNECTION, OWN, RankFailure, now
from stagewright.runtime.job import RunJob
from stagewright.runtime.rescue import Rescue, rescue_folder
from stagewright.runtime.status import RankStatus, StatusFile

_SECOND_LOOK_S = 1.0


def main(path: str) -> int:
    """Run one rank of the job in a file; returns its exit code."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    job = RunJob.load(path)
    status = StatusFile(job.path / "status", world)
    status.write(rank, RankStatus(os.getpid(), 0, 0, -1, "starting"))
    rescue = Rescue(rescue_folder(job.path), rank) if job.rescue else None
    try:
        _run(job, rank, world, status, rescue)
    except BaseException as error:
        signal.alarm(0)
        if _is_connection(error):
            if rescue is not None:
                rescue.run()
            time.sleep(_SECOND_LOOK_S)  # when it is this rank that was cut off, its own beat finds out meanwhile
        _report(job, rank, status, error)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    return 0


def _run(job: RunJob, rank: int, world: int, status: StatusFile, rescue: Rescue | None) -> None:
    from stagewright.runtime.liveness import Liveness, end_on_sigterm

    before_end = rescue.run if rescue is not None else lambda: None
    end_on_sigterm(status, rank, before_end)
    import torch
    import torch.distributed as dist

    from stagewright.modeling.kept_memory import keep_freed_memory
    from stagewright.planner.documents import ModelProfile, Plan
    from stagewright.runtime.program import describe_action, program_of
    from stagewright.runtime.session import Session

    torch.set_num_threads(job.num_threads)
    keep_freed_memory()
    plan, profile = Plan.load(job.path / "plan.json"), ModelProfile.load(job.path / "profile.json")
    schedule, evaluation = program_of(plan, profile)
    liveness = Liveness(
        rank,
        world,
        status,
        job.path,
        launcher=job.launcher,
        describe=lambda other, step, position: describe_action(plan, schedule, other, step, position),
        address=(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])),
        before_end=before_end,
    )
    liveness.start()
    device = _device(plan.cluster.groups[0].device.kind, may_lack=job.emulate)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10), device_id=device if device.type == "cuda" else None)
    os.chdir(job.working_directory)
    Session(job, plan, profile, schedule, evaluation, device, status, rescue).run()
    liveness.stop()
    dist.barrier()
    dist.destroy_process_group()
    status.enter(rank, "done")


def _device(kind: str, *, may_lack: bool) -> object:
    """Return this rank's device; the processor where accelerators may be lacking, as in an emulated run, and are."""
    import torch

    if kind == "cuda" and (torch.cuda.is_available() or not may_lack):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def _report(job: RunJob, rank: int, status: StatusFile, error: BaseException) -> None:
    from stagewright.planner.errors import StagewrightError

    here = status.read(rank)
    try:
        from stagewright.planner.documents import ModelProfile, Plan
        from stagewright.runtime.program import describe_action, program_of

        plan, profile = Plan.load(job.path / "plan.json"), ModelProfile.load(job.path / "profile.json")
        place = describe_action(plan, program_of(plan, profile)[0], rank, here.step, here.position)
    except Exception:
        place = ""
    place = place or f"while {here.phase}"
    if isinstance(error, StagewrightError):
        failure = RankFailure(
            rank, OWN, place, error.message, error.kind, error.field, error.hint, error.exit_code, now()
        )
    else:
        cause = CONNECTION if _is_connection(error) else OWN
        failure = RankFailure(rank, cause, place, f"{type(error).__name__}: {error}", time_s=now())
    failure.save(Path(job.directory), rank)


def _is_connection(error: BaseException) -> bool:
    words = ("connection", "peer", "gloo", "nccl", "socket", "broken pipe", "timed out", "store")
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, (RuntimeError, OSError)) and any(word in text for word in words)


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an interpreter that ends beside a thread of the backend may abort, when all is done and said
