"""Times the joint search: the catalogue's cases, and growth with devices and layers.

    python benchmarks/search.py [CASE ...] [--growth]

Seconds run from parsed documents to the answer, processor seconds of this process beside the clock's; a first small
solve loads the compiled code before either runs. Results go to `benchmarks/results/search.json`; a run of some cases
replaces those and keeps the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine
from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.planning import make_plan

RESULT = Path(__file__).parent / "results" / "search.json"
CASES = {
    "gpt3-64": ("gpt3-175b", "a100-sxm-80g:8x8", 1536, 2048),
    "gpt3-1024": ("gpt3-175b", "a100-sxm-80g:8x128", 1536, 2048),
    "llama3.1-405b": ("llama3.1-405b", "h100-sxm:8x2048", 2048, 8192),
    "llama2-13b": ("llama2-13b", "a100-sxm-80g:8x8", 1024, 4096),
    "mixtral-8x22b": ("mixtral-8x22b", "h100-sxm:8x32", 1024, 4096),
    "deepseek-v3": ("deepseek-v3", "h800-sxm:8x256", 2048, 4096),
}
DEVICES = {f"7b-on-{8 * nodes}": ("llama2-7b", f"h100-sxm:8x{nodes}", 8192, 4096) for nodes in (8, 64, 512, 4096, 8192)}
LAYERS = {
    f"gpt-{layers}-layers": (
        {
            "model_type": "gpt2",
            "n_layer": layers,
            "n_embd": 4096,
            "n_head": 32,
            "n_positions": 2048,
            "vocab_size": 50304,
        },
        "a100-sxm-80g:8x16",
        512,
        2048,
    )
    for layers in (12, 48, 192, 1000)
}


def measure(name: str) -> dict[str, object]:
    """Return one case's answer, counters and seconds."""
    model, cluster, batch, length = {**CASES, **DEVICES, **LAYERS}[name]
    profile, machines = resolve_model(model), resolve_cluster(cluster)
    job = TrainingJob(global_batch=batch, sequence_length=length)
    wall, cpu = time.perf_counter(), time.process_time()
    outcome = make_plan(profile, machines, job)
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    certificate = outcome.plan.certificate if outcome.plan is not None else None
    return {
        "case": name,
        "devices": machines.num_devices,
        "layers": profile.num_layers,
        "status": outcome.status,
        "objective_s": outcome.objective_s,
        "bound_s": outcome.bound_s,
        "gap": outcome.gap,
        "any_order_bound_s": None if certificate is None else certificate.any_order_bound,
        "candidates": outcome.candidates,
        "evaluated": outcome.evaluated,
        "simulated": outcome.simulated,
        "pruned": {} if certificate is None else certificate.pruned,
        **seconds,
    }


def main() -> None:
    """Measure the named cases (all of the catalogue's by default), print a line each and keep them."""
    known_cases = [*CASES, *DEVICES, *LAYERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"what to measure, of {', '.join(known_cases)}")
    parser.add_argument("--growth", action="store_true", help="measure the growth with devices and with layers as well")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cases if name not in known_cases]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(known_cases)}")
    names = arguments.cases or ([] if arguments.growth else list(CASES))
    if arguments.growth:
        names = [*names, *DEVICES, *LAYERS]
    make_plan(
        resolve_model("gpt2"), resolve_cluster("a100-sxm-80g:4x1"), TrainingJob(global_batch=8, sequence_length=512)
    )
    for name in names:
        row = measure(name)
        print(json.dumps(row), flush=True)
        known = json.loads(RESULT.read_text())["cases"] if RESULT.exists() else []
        cases = [case for case in known if case["case"] != name] + [row]
        result = {**machine("python benchmarks/search.py"), "cases": cases}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
