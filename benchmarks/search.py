"""Times the joint search: the catalogue's cases, and growth with devices and layers.

    python benchmarks/search.py [CASE ...] [--growth]
    python benchmarks/search.py --plot
    python benchmarks/search.py --first-run [CASE ...]

Seconds run from parsed documents to the answer, processor seconds of all cores beside the clock's; a first small
solve loads the compiled code before either runs. Each case of the catalogue is solved twice (`again_`): the second time finds
the orders that the process keeps, as a service or a second question about the same cluster does. Results go to `benchmarks/results/search.json`; a run of some cases
replaces those and keeps the others. `--plot` draws the growth from that file into `benchmarks/results/search_growth.svg`,
as `--growth` does at its end: seconds over devices and over layers, both axes logarithmic, with the exponent of a power
law through the points. `--first-run` measures what an installation's very first search waits for: each case in a new process
with an empty folder of compiled functions, then in another with what that left, both from the process's start to its end
with all of its children's processor seconds; into `benchmarks/results/first_run.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import children_cpu_s, cpu_seconds, machine
from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.compiling import compiled_by_two
from stagewright.planner.documents import TrainingJob
from stagewright.planner.planning import make_plan

RESULT = Path(__file__).parent / "results" / "search.json"
FIRST_RUN = RESULT.with_name("first_run.json")
PLOT = RESULT.with_name("search_growth.svg")
CASES = {
    "gpt3-64": ("gpt3-175b", "a100-sxm-80g:8x8", 1536, 2048),
    "gpt3-1024": ("gpt3-175b", "a100-sxm-80g:8x128", 1536, 2048),
    "llama3.1-405b": ("llama3.1-405b", "h100-sxm:8x2048", 2048, 8192),
    "llama2-13b": ("llama2-13b", "a100-sxm-80g:8x8", 1024, 4096),
    "llama2-13b-mixed": ("llama2-13b", "a100-sxm-80g:8x4+v100-sxm-32g:8x4", 1024, 4096),
    "vit-l-llama3-8b": ("vit-l-llama3-8b", "h100-sxm:8x8", 512, 4096),
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
    seconds: dict[str, float] = {}
    for prefix in ("", "again_") if name in CASES else ("",):
        wall, cpu = time.perf_counter(), cpu_seconds()
        outcome = make_plan(profile, machines, job)
        seconds |= {f"{prefix}wall_s": time.perf_counter() - wall, f"{prefix}cpu_s": cpu_seconds() - cpu}
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


def measure_first_run(name: str) -> dict[str, object]:
    """Return one case's seconds in a process that finds nothing compiled, and in the next one."""
    row: dict[str, object] = {"case": name}
    with tempfile.TemporaryDirectory() as folder:
        for prefix in ("first", "later"):
            wall, cpu = time.perf_counter(), children_cpu_s()
            subprocess.run(
                [sys.executable, __file__, "--plan-only", name],
                env={**os.environ, "NUMBA_CACHE_DIR": folder},
                check=True,
            )
            row |= {f"{prefix}_wall_s": time.perf_counter() - wall, f"{prefix}_cpu_s": children_cpu_s() - cpu}
    return row


def keep(path: Path, command: str, row: dict[str, object]) -> None:
    """Put a case's row in place of its last one in a result file."""
    known = json.loads(path.read_text())["cases"] if path.exists() else []
    cases = [case for case in known if case["case"] != row["case"]] + [row]
    path.write_text(json.dumps({**machine(command), "cases": cases}, indent=2) + "\n")


def plan(name: str) -> None:
    """Plan a case once, as `stagewright plan` does, compiling what is not."""
    model, cluster, batch, length = CASES[name]
    with compiled_by_two():
        job = TrainingJob(global_batch=batch, sequence_length=length)
        make_plan(resolve_model(model), resolve_cluster(cluster), job)


def power(points: Sequence[tuple[float, float]]) -> float:
    """Return the exponent of the power law through points (x, seconds), by least squares of logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread


def panel(points: Sequence[tuple[float, float]], label: str, left: float) -> list[str]:
    """Return the marks of one panel, 320 x 240 pixels behind `left`: a line through the points, their values beside them."""
    lows = [math.floor(math.log10(min(column))) for column in zip(*points, strict=True)]
    highs = [math.ceil(math.log10(max(column))) for column in zip(*points, strict=True)]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - lows[0]) / max(highs[0] - lows[0], 1)
        up = (math.log10(y) - lows[1]) / max(highs[1] - lows[1], 1)
        return left + 320 * across, 290 - 240 * up

    marks = [f'<rect x="{left}" y="50" width="320" height="240" fill="none" stroke="#888"/>']
    for exponent in range(lows[0], highs[0] + 1):
        x, _ = place(10.0**exponent, 10.0 ** lows[1])
        marks.append(f'<text x="{x:.1f}" y="306" text-anchor="middle">{10**exponent:,}</text>')
    for exponent in range(lows[1], highs[1] + 1):
        _, y = place(10.0 ** lows[0], 10.0**exponent)
        marks.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**exponent:g} s</text>')
    line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
    marks.append(f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>')
    for x, y in points:
        across, down = place(x, y)
        marks.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="#1f6feb"/>')
        marks.append(f'<text x="{across:.1f}" y="{down - 10:.1f}" text-anchor="middle">{y:.3g}</text>')
    title = f"CPU seconds over {label}: grows with power {power(points):.2f}"
    return [*marks, f'<text x="{left + 160}" y="30" text-anchor="middle">{title}</text>']


def plot(rows: Sequence[dict[str, object]]) -> str:
    """Return the picture of the growth with devices and with layers."""
    of_name = {row["case"]: row for row in rows}
    marks: list[str] = []
    for names, size, left in ((DEVICES, "devices", 60.0), (LAYERS, "layers", 460.0)):
        points = [(float(str(of_name[name][size])), float(str(of_name[name]["cpu_s"]))) for name in names]
        marks += panel(points, size, left)
    style = 'font-family="sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="330" {style}>' + "".join(marks) + "</svg>\n"


def main() -> None:
    """Measure the named cases (all of the catalogue's by default), print a line each and keep them."""
    known_cases = [*CASES, *DEVICES, *LAYERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"what to measure, of {', '.join(known_cases)}")
    parser.add_argument("--growth", action="store_true", help="measure the growth with devices and with layers as well")
    parser.add_argument(
        "--plot", action="store_true", help=f"draw {PLOT.name} from the result file and measure nothing"
    )
    parser.add_argument(
        "--first-run", action="store_true", help="measure the first search of an installation and a later one"
    )
    parser.add_argument("--plan-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cases if name not in known_cases]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(known_cases)}")
    if arguments.plot:
        PLOT.write_text(plot(json.loads(RESULT.read_text())["cases"]))
        return
    if arguments.plan_only or arguments.first_run:
        for name in arguments.cases or CASES:
            if name not in CASES:
                parser.error(f"{name} is of the growth; --first-run measures {', '.join(CASES)}")
            if arguments.plan_only:
                plan(name)
            else:
                row = measure_first_run(name)
                print(json.dumps(row), flush=True)
                keep(FIRST_RUN, "python benchmarks/search.py --first-run", row)
        return
    names = arguments.cases or ([] if arguments.growth else list(CASES))
    if arguments.growth:
        names = [*names, *DEVICES, *LAYERS]
    small = TrainingJob(global_batch=8, sequence_length=512)
    with compiled_by_two():
        make_plan(resolve_model("gpt2"), resolve_cluster("a100-sxm-80g:4x1"), small)
    for name in names:
        row = measure(name)
        print(json.dumps(row), flush=True)
        keep(RESULT, "python benchmarks/search.py", row)
    if arguments.growth:
        PLOT.write_text(plot(json.loads(RESULT.read_text())["cases"]))


if __name__ == "__main__":
    main()
