"""Times the joint search on the catalogue's cases and prints objective, bound and gap as JSON lines.

    python benchmarks/search.py [CASE ...]

Wall seconds run from parsed documents to the answer; a first small solve loads the compiled code before the clock runs.
"""

from __future__ import annotations

import json
import platform
import sys
import time

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.planning import make_plan

CASES = {
    "gpt3-64": ("gpt3-175b", "a100-sxm-80g:8x8", 1536, 2048),
    "gpt3-1024": ("gpt3-175b", "a100-sxm-80g:8x128", 1536, 2048),
    "405b": ("llama3.1-405b", "h100-sxm:8x2048", 2048, 8192),
    "13b": ("llama2-13b", "a100-sxm-80g:8x8", 1024, 4096),
    "mixtral": ("mixtral-8x22b", "h100-sxm:8x32", 1024, 4096),
}


def main(names: list[str]) -> None:
    """Print one line for each case."""
    make_plan(
        resolve_model("gpt2"), resolve_cluster("a100-sxm-80g:4x1"), TrainingJob(global_batch=8, sequence_length=512)
    )
    for name in names or list(CASES):
        model, cluster, batch, length = CASES[name]
        profile, machines = resolve_model(model), resolve_cluster(cluster)
        job = TrainingJob(global_batch=batch, sequence_length=length)
        wall, cpu = time.perf_counter(), time.process_time()
        outcome = make_plan(profile, machines, job)
        row = {
            "case": name,
            "status": outcome.status,
            "objective_s": outcome.objective_s,
            "bound_s": outcome.bound_s,
            "gap": outcome.gap,
            "candidates": outcome.candidates,
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "machine": platform.processor() or platform.machine(),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
