"""Every named planner on the catalogue's cases and on the peers' published profiles, scored by the common simulator.

    python benchmarks/planners.py [CASE ...]        writes benchmarks/results/planners.json
    python benchmarks/planners.py --page            writes docs/planners.md from it

Each planner has CPU_S processor seconds, for the clock counts what other processes take; what it has found by then counts.
Peers' profiles are read from STAGEWRIGHT_PEER_PROFILES and left out where it is unset. A plan of another planner that is
faster than the exact planner's is listed as a violation: it would be a fault of the search.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stagewright.formats.aceso import cluster_from_aceso, profile_from_aceso, read_aceso_folder
from stagewright.formats.pipedream_graph import parse_graph, profile_from_graph
from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import Cluster, ModelProfile, TrainingJob
from stagewright.planner.documents.job import SearchSpace
from stagewright.planner.errors import StagewrightError
from stagewright.planner.planners.registry import planners
from stagewright.planner.planning import make_plan

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import cpu_seconds, machine

RESULT = Path(__file__).parent / "results" / "planners.json"
PAGE = Path(__file__).parents[1] / "docs" / "planners.md"
CPU_S = 90.0

Question = tuple[ModelProfile, Cluster, TrainingJob]


def catalogue(model: str, cluster: str, batch: int, length: int) -> Question:
    """Return a case of the catalogue."""
    return resolve_model(model), resolve_cluster(cluster), TrainingJob(global_batch=batch, sequence_length=length)


def pipedream(folder: Path, name: str, microbatch: int, workers: int) -> Question:
    """Return one of PipeDream's graphs on V100s, its minibatch as the microbatch."""
    profile = profile_from_graph(
        parse_graph((folder / "pipedream" / f"{name}.graph.txt").read_text(), source=name),
        name=name,
        microbatch=microbatch,
    )
    cluster = resolve_cluster(f"v100-sxm-32g:{workers}x1")
    space = SearchSpace(max_microbatch=microbatch)
    return (
        profile,
        cluster,
        TrainingJob(
            global_batch=8 * microbatch, sequence_length=profile_length(profile), precision="fp32", space=space
        ),
    )


def profile_length(profile: ModelProfile) -> int:
    """Return the sequence length that a profile was measured with."""
    return next(cost.sequence_length for layer in profile.classes.values() for cost in layer.costs)


def aceso(folder: Path) -> Question:
    """Return Aceso's GPT-1.3B on four V100s with 12,000 MB."""
    tables = read_aceso_folder(folder / "aceso", "gpt_1_3B")
    profile = profile_from_aceso(tables, num_blocks=24, sequence_length=2048, grain="block")
    cluster = cluster_from_aceso(tables, name="v100-12g", num_devices=4, memory_bytes=12_000 * 2**20)
    space = SearchSpace(memory_headroom=0.0, max_microbatch=8)
    return profile, cluster, TrainingJob(global_batch=512, sequence_length=2048, precision="fp16", space=space)


CASES: dict[str, Callable[[], Question]] = {
    "gpt2, 8 A100": lambda: catalogue("gpt2", "a100-sxm-80g:8x1", 64, 1024),
    "llama2-13b, 64 A100": lambda: catalogue("llama2-13b", "a100-sxm-80g:8x8", 1024, 4096),
    "gpt3-175b, 64 A100": lambda: catalogue("gpt3-175b", "a100-sxm-80g:8x8", 1536, 2048),
    "gpt3-175b, 1,024 A100": lambda: catalogue("gpt3-175b", "a100-sxm-80g:8x128", 1536, 2048),
    "llama3.1-405b, 16,384 H100": lambda: catalogue("llama3.1-405b", "h100-sxm:8x2048", 2048, 8192),
    "mixtral-8x22b, 256 H100": lambda: catalogue("mixtral-8x22b", "h100-sxm:8x32", 1024, 4096),
    "deepseek-v3, 2,048 H800": lambda: catalogue("deepseek-v3", "h800-sxm:8x256", 2048, 4096),
    "vit-l-llama3-8b, 64 H100": lambda: catalogue("vit-l-llama3-8b", "h100-sxm:8x8", 512, 4096),
}
PEERS: dict[str, Callable[[Path], Question]] = {
    "PipeDream's vgg16, 4 V100": lambda folder: pipedream(folder, "vgg16", 64, 4),
    "PipeDream's resnet50, 4 V100": lambda folder: pipedream(folder, "resnet50", 128, 4),
    "Aceso's GPT-1.3B, 4 V100": aceso,
}


def cases() -> dict[str, Callable[[], Question]]:
    """Return all cases that can run here."""
    folder = os.environ.get("STAGEWRIGHT_PEER_PROFILES")
    if not folder:
        print("STAGEWRIGHT_PEER_PROFILES is not set: the peers' profiles are left out", file=sys.stderr)
        return CASES
    return CASES | {name: lambda make=make: make(Path(folder)) for name, make in PEERS.items()}


def rows(name: str, question: Question) -> Iterator[dict[str, object]]:
    """Yield one row for each planner."""
    profile, cluster, job = question
    for planner in planners():
        if planner.name == "exhaustive":
            continue
        row: dict[str, object] = {"case": name, "planner": planner.name, "objective": planner.objective}
        cpu = cpu_seconds()
        try:
            outcome = make_plan(profile, cluster, job, planner=planner.name, should_stop=ends_after(CPU_S), top=0)
        except StagewrightError as error:
            yield row | {"status": error.kind, "message": error.message}
            continue
        row |= {"status": outcome.status, "cpu_s": round(cpu_seconds() - cpu, 3)}
        if outcome.plan is None:
            yield row | {"message": "nothing it chooses fits"}
            continue
        plan = outcome.plan
        degrees, spec = plan.stages[0].degrees, plan.schedule
        yield row | {
            "own_objective": outcome.own_objective,
            "step_time_s": plan.prediction.step_time_s,
            "bound_s": outcome.bound_s,
            "peak_memory_bytes": max(plan.prediction.peak_memory_bytes),
            "plan": f"{spec.name} pp={spec.num_ranks} v={spec.num_chunks} dp={degrees.dp} tp={degrees.tp} "
            f"zero={degrees.zero} microbatch={spec.microbatch}",
        }


def ends_after(cpu_s: float) -> Callable[[], bool]:
    """Return what tells whether this process has worked so many seconds more."""
    end_s = time.process_time() + cpu_s
    return lambda: time.process_time() >= end_s


def violations(found: list[dict[str, object]]) -> list[str]:
    """Return what is faster than the exact planner's plan."""
    exact = {
        row["case"]: float(str(row["step_time_s"]))
        for row in found
        if row["planner"] == "exact" and "step_time_s" in row
    }
    return [
        f"{row['case']}: {row['planner']} {float(str(row['step_time_s'])):.6g} s, exact {exact[row['case']]:.6g} s"
        for row in found
        if row["case"] in exact
        and "step_time_s" in row
        and float(str(row["step_time_s"])) < exact[row["case"]] * (1 - 1e-9)
    ]


def page(result: dict[str, object]) -> str:
    """Return docs/planners.md."""
    found: list[dict[str, object]] = result["rows"]  # type: ignore[assignment]
    wrong = violations(found)
    lines = [
        "# Named planners side by side\n",
        "Every planner answers the same question under its own objective and within its published limits; the common",
        "simulator scores the plan. *Over bound* is against the lower bound that the exact planner proved in the same run.",
        "A planner whose dimensions leave nothing that fits says so. Degrees are equal on all stages here, so planners that",
        "replicate stages unequally (PipeDream, DAPPLE, Piper, Alpa) are held to equal ones.",
        f"A planner has {CPU_S:g} CPU seconds a case; what it has found by then counts.\n",
        f"Made by `{result['command']}` on {result['date']}, {result['processor']}, {result['cores']} cores; CPU seconds of",
        "one process, compilation on first use included.\n",
        "Plans faster than the exact planner's: " + ("; ".join(wrong) if wrong else "none") + ".\n",
    ]
    for case in (name for name in CASES | PEERS if any(row["case"] == name for row in found)):
        mine = [row for row in found if row["case"] == case]
        bound = next((float(str(row["bound_s"])) for row in mine if row.get("bound_s")), None)
        lines += [
            f"## {case}\n",
            "| planner | own objective | step, s | over bound | peak, GiB | CPU, s | plan |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in sorted(mine, key=lambda row: float(str(row.get("step_time_s", "inf")))):
            if "step_time_s" not in row:
                lines.append(
                    f"| {row['planner']} | | | | | {row.get('cpu_s', '')} | {str(row['message']).replace('|', '/')} |"
                )
                continue
            step, own = float(str(row["step_time_s"])), row["own_objective"]
            value = "" if own is None else _own(float(str(own)), str(row["objective"]))
            over = "" if bound is None else f"{step / bound - 1:+.1%}"
            peak = f"{float(str(row['peak_memory_bytes'])) / 2**30:.1f}"
            lines.append(
                f"| {row['planner']} | {value} | {step:.4g} | {over} | {peak} | {row['cpu_s']:.1f} | {row['plan']} |"
            )
        lines.append("")
    return "\n".join(lines)


def _own(value: float, words: str) -> str:
    return f"{value / 2**30:.1f} GiB" if "bytes" in words else f"{value:.4g} s"


def main() -> None:
    """Run the cases, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(json.loads(RESULT.read_text())))
        return
    known = (RESULT.exists() and json.loads(RESULT.read_text())["rows"]) or []
    found = [row for row in known if options.case and row["case"] not in options.case]
    for name, make in cases().items():
        if options.case and name not in options.case:
            continue
        for row in rows(name, make()):
            print(json.dumps(row), flush=True)
            found.append(row)
        result = {**machine("python benchmarks/planners.py"), "violations": violations(found), "rows": found}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for line in violations(found):
        print(f"violation: {line}")


if __name__ == "__main__":
    main()
