"""The `auto` schedule against 75 published rows, 200 random uneven instances and an exact solver.

Writes benchmarks/results/auto_schedules.json: for each row the makespan found on its own placement and on a free one,
with the row's largest peak as the cap; for each random instance the best named schedule that fits; the gap to the proved bound,
median and worst; and how often small instances are proved optimal. The best named schedule is the best synchronous one with at most two
copies of the weights, on any placement of the request, whose activations keep the cap: each of them is generated, or proved not to be
better. What orders of one copy take stands beside, and those with two copies (chimera, gems, dualpipe) are generated once more
without the search's shortcuts; that their weights and gradients take twice the memory is not held against them.

Usage: python benchmarks/auto_schedules.py [--rows FILE] [--evaluations N] [--instances N]
FILE is schedules.csv of the published rows; $STAGEWRIGHT_PEER_PROFILES/schedules.csv unless told.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402
from stagewright.planner.errors import Infeasible, StagewrightError  # noqa: E402
from stagewright.planner.schedules import registry  # noqa: E402
from stagewright.planner.schedules.auto import AutoRequest, AutoResult, PlacementChoice, search  # noqa: E402
from stagewright.planner.schedules.auto.site import stage_costs  # noqa: E402
from stagewright.planner.schedules.costs import StageCosts  # noqa: E402
from stagewright.planner.schedules.family import ScheduleRequest  # noqa: E402
from stagewright.planner.schedules.peak import peak_activations  # noqa: E402
from stagewright.planner.simulation.network import Links  # noqa: E402
from stagewright.planner.simulation.simulate import simulate  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "auto_schedules.json"
SLACK = 1e-9


@dataclass(frozen=True)
class Row:
    """One published schedule."""

    name: str
    num_ranks: int
    num_microbatches: int
    costs: tuple[float, float, float, float]
    makespan: float
    cap: float
    shape: str
    chunks: int

    @property
    def is_unit(self) -> bool:
        return self.costs == (1.0, 1.0, 1.0, 0.0)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of schedules.csv; the cap is the largest of the peaks over ranks."""
    rows = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            name = line["schedule"]
            chunks = 1 if name.startswith(("ZB-H", "ZB(")) or name == "1F1B" else 2
            if "v=4" in name:
                chunks = 4
            is_v = chunks == 2 and any(part in name for part in ("ZB-V", "V-", "-V", "ZBV", "DualPipeV"))
            rows.append(
                Row(
                    name,
                    int(line["ranks"]),
                    int(line["microbatches"]),
                    tuple(float(cost) for cost in line["F/I/W/comm"].split("/")),  # type: ignore[arg-type]
                    float(line["makespan"]),
                    max(float(peak) for peak in line["peak_freed_at_W"].split("..")),
                    "wave" if is_v else "loop",
                    chunks,
                )
            )
    return rows


def solve_row(row: Row, evaluations: int, *, free: bool) -> AutoResult:
    """Return the search's answer under the row's cap."""
    forward, input_grad, weight_grad, latency = row.costs
    costs = StageCosts.uniform(row.num_ranks, forward_s=forward, input_grad_s=input_grad, weight_grad_s=weight_grad)
    own = PlacementChoice.V if row.shape == "wave" else PlacementChoice.LOOP
    return search(
        AutoRequest(
            row.num_ranks,
            row.num_microbatches,
            costs,
            latency_s=latency,
            memory_cap=row.cap,
            placement=PlacementChoice.ANY if free else own,
            chunk_counts=(1, 2, 4) if free else (row.chunks,),
            evaluations=evaluations,
        )
    )


def bench_rows(rows: list[Row], evaluations: int) -> dict[str, object]:
    """Return every row with its two answers, and the counts."""
    table = []
    answers: dict[tuple[object, ...], AutoResult] = {}
    for row in rows:
        entry: dict[str, object] = {
            "schedule": row.name, "ranks": row.num_ranks, "microbatches": row.num_microbatches, "costs": row.costs,
            "cap": row.cap, "published": row.makespan,
        }  # fmt: skip
        for free in (False, True):
            key = (row.num_ranks, row.num_microbatches, row.costs, row.cap, free or (row.shape, row.chunks))
            started = time.monotonic()
            if key not in answers:
                answers[key] = solve_row(row, evaluations, free=free)
            found = answers[key]
            entry["free" if free else "own"] = {
                "makespan": found.makespan_s, "bound": found.bound_s, "stop": found.stop.value,
                "placement": f"{found.placement}{found.num_chunks}", "evaluations": found.evaluations,
                "seconds": round(time.monotonic() - started, 2),
            }  # fmt: skip
        print(json.dumps(entry), flush=True)
        table.append(entry)
    return {"counts": _counts(rows, table), "rows": table}


def _counts(rows: list[Row], table: list[dict[str, object]]) -> dict[str, object]:
    counts: dict[str, object] = {}
    for label, wanted in (("unequal", False), ("unit", True)):
        for place in ("own", "free"):
            pairs = [
                (float(entry[place]["makespan"]), row.makespan)  # type: ignore[index]
                for row, entry in zip(rows, table, strict=True)
                if row.is_unit == wanted
            ]
            counts[f"{label} costs, {place} placement"] = {
                "better": sum(found < published * (1 - SLACK) for found, published in pairs),
                "equal": sum(abs(found - published) <= published * SLACK for found, published in pairs),
                "worse": sum(found > published * (1 + SLACK) for found, published in pairs),
                "mean_gain_percent": round(
                    100 * statistics.mean(1 - found / published for found, published in pairs), 2
                ),
            }
    return counts


def random_request(rng: np.random.Generator, evaluations: int) -> AutoRequest:
    """Return an uneven instance: D in 2..16, T up to 4 D, fine-grained costs U(0.5, 1.5), random latency and cap."""
    ranks = int(rng.integers(2, 17))
    microbatches = int(rng.integers(2, 4 * ranks + 1))
    layers = 4 * ranks
    forward, input_grad, weight_grad = rng.uniform(0.5, 1.5, (3, layers)) / 4
    costs = StageCosts.of(forward, input_grad, weight_grad, activation=np.full(layers, 0.25))
    cap = float(rng.choice([0.5, 0.75, 1.0, 1.5, 2.0])) * ranks
    return AutoRequest(
        ranks,
        microbatches,
        costs,
        latency_s=float(rng.choice([0.0, 0.05, 0.2, 0.5])),
        memory_cap=max(1.0, cap),
        evaluations=evaluations,
    )


def best_with_two_copies(request: AutoRequest) -> tuple[str, float] | None:
    """Return name and makespan of the best synchronous schedule that keeps two copies of the weights and fits the cap; None without one."""
    costs = stage_costs(request.costs, request.num_ranks)
    assert costs is not None
    assert request.memory_cap is not None
    found: list[tuple[float, str]] = []
    for family in registry.families():
        if not family.synchronous or family.num_replicas == 1:
            continue
        cap = float(np.min(request.memory_cap))
        for given in (None, cap) if family.takes_cap else (None,):
            asked = ScheduleRequest(
                request.num_ranks, request.num_microbatches, costs=costs, latency_s=request.latency_s, memory_cap=given
            )
            try:
                schedule = family.generate(asked)
                makespan_s = simulate(schedule, costs, links=Links(latency_s=request.latency_s)).makespan_s
            except StagewrightError:
                continue
            is_same_work = schedule.num_microbatches == request.num_microbatches and schedule.num_slices == 1
            if is_same_work and peak_activations(schedule, costs).max() <= cap * (1.0 + SLACK):
                found.append((makespan_s, family.name))
    return (min(found)[1], min(found)[0]) if found else None


def bench_random(instances: int, evaluations: int) -> dict[str, object]:
    """Return every random instance with the best named schedule that fits, and the gaps."""
    table = []
    for index in range(instances):
        request = random_request(np.random.default_rng(index), evaluations)
        started = time.process_time()
        try:
            found = search(request)
        except Infeasible as error:
            table.append({"index": index, "infeasible": error.message})
            continue
        cpu_s = round(time.process_time() - started, 2)
        gain = found.gain
        entry = {
            "index": index, "ranks": request.num_ranks, "microbatches": request.num_microbatches,
            "cap": request.memory_cap, "latency": request.latency_s,
            "makespan": found.makespan_s, "bound": found.bound_s, "gap": found.gap, "stop": found.stop.value,
            "placement": f"{found.placement}{found.num_chunks}", "copies": found.num_copies,
            "one_copy": {"makespan": found.one_copy.makespan_s, "bound": found.one_copy.bound_s},
            "best_named": None if gain is None else gain.name,
            "best_named_makespan": None if gain is None else gain.named_s,
            "best_split_makespan": None if gain is None else gain.split_s,
            "best_with_two_copies": best_with_two_copies(request),
            "cpu_s": cpu_s,
        }  # fmt: skip
        print(json.dumps(entry), flush=True)
        table.append(entry)
    solved = [entry for entry in table if "gap" in entry]
    gaps = [float(entry["gap"]) for entry in solved]  # type: ignore[arg-type]
    one_copy = [entry["one_copy"]["makespan"] / entry["one_copy"]["bound"] - 1 for entry in solved]  # type: ignore[index]
    saved = [1 - entry["makespan"] / entry["one_copy"]["makespan"] for entry in solved if entry["copies"] == 2]  # type: ignore[index,operator]
    named = [entry for entry in solved if entry["best_named"] is not None]
    doubled = [
        (float(entry["makespan"]), entry["best_with_two_copies"][1])
        for entry in solved
        if entry["best_with_two_copies"]
    ]  # type: ignore[arg-type,index]
    gains = [1 - float(entry["makespan"]) / float(entry["best_named_makespan"]) for entry in named]  # type: ignore[arg-type]
    return {
        "instances": len(table),
        "with_a_named_schedule_that_fits": len(named),
        "lost_to_a_named_schedule": sum(gain < -SLACK for gain in gains),
        "better_than_every_named_schedule": sum(gain > SLACK for gain in gains),
        "with_two_copies_of_the_weights": {
            "instances_with_one_that_fits": len(doubled),
            "shorter_than_auto": sum(other_s < found_s * (1 - SLACK) for found_s, other_s in doubled),
            "most_shorter_percent": round(
                100 * max((1 - other_s / found_s for found_s, other_s in doubled), default=0.0), 2
            ),
        },
        "gain_percent": {"median": round(100 * statistics.median(gains), 2), "worst": round(100 * min(gains), 2)},
        "gap_percent": {"median": round(100 * statistics.median(gaps), 2), "worst": round(100 * max(gaps), 2)},
        "one_copy": {
            "gap_percent": {
                "median": round(100 * statistics.median(one_copy), 2),
                "worst": round(100 * max(one_copy), 2),
            },
            "proved_optimal": sum(gap <= SLACK for gap in one_copy),
        },
        "answered_with_two_copies": {
            "instances": len(saved),
            "saved_percent": {
                "median": round(100 * statistics.median(saved or [0.0]), 2),
                "most": round(100 * max(saved, default=0.0), 2),
            },
        },
        "cpu_s": {
            part: round(value, 2)
            for part, value in (
                ("mean", statistics.mean(float(entry["cpu_s"]) for entry in solved)),  # type: ignore[arg-type]
                ("worst", max(float(entry["cpu_s"]) for entry in solved)),  # type: ignore[arg-type]
            )
        },
        "proved_optimal": sum(entry["stop"] == "optimal" for entry in solved),
        "bound_above_makespan": sum(gap < -SLACK for gap in gaps),
        "table": table,
    }


def main() -> int:
    """Run the parts, write the result file and print the counts."""
    folder = os.environ.get("STAGEWRIGHT_PEER_PROFILES", "")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path(folder) / "schedules.csv" if folder else None)
    parser.add_argument("--evaluations", type=int, default=5_000_000)
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--parts", nargs="*", default=["rows", "random"], choices=["rows", "random"])
    options = parser.parse_args()
    result: dict[str, object] = {}
    if "rows" in options.parts and options.rows is not None and options.rows.exists():
        result["published_rows"] = {"evaluations": options.evaluations} | bench_rows(
            read_rows(options.rows), options.evaluations
        )
        print(json.dumps(result["published_rows"]["counts"], indent=1))  # type: ignore[index]
    if "random" in options.parts and options.instances:
        result["random_instances"] = {"evaluations": options.evaluations} | bench_random(
            options.instances, options.evaluations
        )
        print(json.dumps({key: value for key, value in result["random_instances"].items() if key != "table"}, indent=1))  # type: ignore[attr-defined]
    RESULT.parent.mkdir(exist_ok=True)
    known: dict[str, object] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    command = f"python benchmarks/auto_schedules.py --evaluations {options.evaluations} --instances {options.instances}"
    for part, found in result.items():
        known[part] = machine(f"{command} --parts {part.split('_')[1 if part.startswith('published') else 0]}") | found  # type: ignore[operator]
    RESULT.write_text(json.dumps(known, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
