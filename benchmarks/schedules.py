"""How fast schedules are generated and simulated, compiled, on one core.

Usage: python benchmarks/schedules.py [PART ...]; writes benchmarks/results/schedules.json. A part is a function that
returns a dictionary; a run of some parts leaves the others in the file as they were. Times are processor seconds of this
process (other work on the machine does not count), the least and the median of several runs; an action is one F, B, I
or W.

- kernel: the makespan of compiled orders, single and in a batch of cost vectors, and with the critical path traced.
- simulator: events, memory ledger, messages on links, and critical path, of compute-only and of lowered orders.
- end_to_end: generation and simulation of 1F1B at D = 64, T = 16,384 (target 1 s) and of zb-v at D = 64, T = 512
  (target 0.3 s).
- cold: seconds until the first simulation in a process without compiled code, and with it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.lowering import lower
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.simulation.kernel import compile_order, critical_path, makespan, makespans
from stagewright.planner.simulation.network import Links
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.validate import validate

RESULT = Path(__file__).parent / "results" / "schedules.json"
BUSY = Links(latency_s=0.05, bytes_per_s=10.0, boundary_bytes=1.0)


def measured(action: Callable[[], object], *, runs: int = 9) -> dict[str, float]:
    """Return least and median processor seconds of `action`, after one run that compiles."""
    action()
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return {"least_s": min(seconds), "median_s": statistics.median(seconds)}


def rate(schedule: Schedule, action: Callable[[], object], *, repeats: int = 1, runs: int = 9) -> dict[str, float]:
    """Return `measured` with millions of actions a second, at the least and at the median time."""
    found = measured(action, runs=runs)
    total = schedule.num_actions * repeats / 1e6
    best, usual = total / found["least_s"], total / found["median_s"]
    return found | {"actions": schedule.num_actions, "million_per_s": best, "million_per_s_median": usual}


def uniform(schedule: Schedule) -> StageCosts:
    """Return unit stages for a schedule, shared by the chunks of a rank."""
    return StageCosts.uniform(schedule.num_stages, num_chunks=max(1, schedule.num_stages // schedule.num_ranks))


def kernel() -> dict[str, object]:
    """Time the makespan kernel; the target is 100 million actions a second."""
    sizes = (("1f1b", 8, 64), ("1f1b", 16, 4096), ("zb-v", 16, 256), ("interleaved", 16, 512))
    return {f"{name} D={ranks} T={count}": kernel_case(name, ranks, count) for name, ranks, count in sizes}


def kernel_case(name: str, ranks: int, microbatches: int) -> dict[str, object]:
    """Time compilation, makespans and cuts of one order."""
    schedule = generate(name, ScheduleRequest(ranks, microbatches))
    costs, order = uniform(schedule), compile_order(schedule)
    times = (costs.forward_s, costs.input_grad_s, costs.weight_grad_s)
    batch = tuple(np.random.default_rng(0).uniform(0.5, 1.5, (200, schedule.num_stages)) for _ in range(3))
    return {
        "compile": rate(schedule, lambda: compile_order(schedule)),
        "makespan": rate(schedule, lambda: makespan(order, *times, 0.1)),
        "makespans of 200 cost vectors": rate(schedule, lambda: makespans(order, *batch, 0.1), repeats=200, runs=3),
        "critical_path": rate(schedule, lambda: critical_path(order, *times, 0.1)),
    }


def simulator() -> dict[str, object]:
    """Time the rich simulator; the target is 10 million actions a second."""
    sizes = (("1f1b", 16, 4096), ("zb-v", 16, 1024), ("interleaved", 16, 1024))
    found: dict[str, object] = {
        f"{name} D={ranks} T={count}": simulator_case(name, ranks, count) for name, ranks, count in sizes
    }
    schedule = generate("1f1b", ScheduleRequest(16, 256))
    lowered = lower(schedule, uniform(schedule), data_parallel=True, zero=3)
    case = rate(schedule, lambda: simulate(lowered, uniform(schedule), links=BUSY))
    return found | {"1f1b D=16 T=256, lowered with ZeRO-3": case}


def simulator_case(name: str, ranks: int, microbatches: int) -> dict[str, object]:
    """Time simulation with free and with busy links, and the validator."""
    schedule = generate(name, ScheduleRequest(ranks, microbatches))
    costs = uniform(schedule)
    return {
        "free messages": rate(schedule, lambda: simulate(schedule, costs)),
        "links with occupancy": rate(schedule, lambda: simulate(schedule, costs, links=BUSY)),
        "validator": rate(schedule, lambda: validate(schedule)),
    }


def end_to_end() -> dict[str, object]:
    """Time generation and simulation together at the sizes the targets name."""

    def run(name: str, ranks: int, microbatches: int) -> None:
        schedule = generate(name, ScheduleRequest(ranks, microbatches))
        simulate(schedule, uniform(schedule), links=Links(latency_s=0.05))

    return {
        "1f1b D=64 T=16384": measured(lambda: run("1f1b", 64, 16_384), runs=5) | {"target_s": 1.0},
        "zb-v D=64 T=512": measured(lambda: run("zb-v", 64, 512), runs=5) | {"target_s": 0.3},
    }


def cold() -> dict[str, object]:
    """Time a first simulation in fresh processes, without and with compiled code on disk."""
    script = (
        "import numpy as np\n"
        "from stagewright.planner.schedules.registry import generate\n"
        "from stagewright.planner.schedules.family import ScheduleRequest\n"
        "from stagewright.planner.schedules.costs import StageCosts\n"
        "from stagewright.planner.simulation.network import Links\n"
        "from stagewright.planner.simulation.simulate import simulate\n"
        "simulate(generate('1f1b', ScheduleRequest(4, 8)), StageCosts.uniform(4), links=Links(latency_s=0.1))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for _ in range(2):
            start = os.times()
            subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"NUMBA_CACHE_DIR": folder})
            end = os.times()
            seconds.append(end.children_user + end.children_system - start.children_user - start.children_system)
    return {"without_compiled_code_s": seconds[0], "with_compiled_code_s": seconds[1]}


PARTS: dict[str, Callable[[], dict[str, object]]] = {
    "kernel": kernel,
    "simulator": simulator,
    "end_to_end": end_to_end,
    "cold": cold,
}


def main(names: list[str]) -> int:
    """Run the named parts, or all, and write the result file."""
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        print(f"there is no part {unknown[0]!r}; known: {', '.join(PARTS)}")
        return 2
    document = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in names or list(PARTS):
        opening = machine(f"python benchmarks/schedules.py {name}")
        document[name] = {"machine": opening, "result": PARTS[name]()}
        print(json.dumps({name: document[name]["result"]}, indent=1), flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
