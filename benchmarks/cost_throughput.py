"""Full configurations priced in a second on one core: the compiled path beside the scalar one, and their difference.

A configuration is degrees (tp, cp, dp, pp, SP, vocabulary), ZeRO stage, recomputation, schedule family, chunks and
microbatch of an LLM; its price is step seconds and peak bytes. Seconds are the process's own (CPU time of one thread), so
that other work on the machine does not count. Tables of distinct shapes are priced anew inside the measured span.

    python benchmarks/cost_throughput.py
"""

from __future__ import annotations

import json
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
from machine import machine

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.cost import CostModel
from stagewright.planner.cost.batch import Choices, estimate_all
from stagewright.planner.cost.step_time import FAMILIES, Choice, estimate
from stagewright.planner.documents import Degrees, Recompute, TrainingJob

RESULT = Path(__file__).parent / "results" / "cost_throughput.json"
NUM_ROWS = 1_000_000
NUM_COMPARED = 400
CASES = (
    ("gpt3-175b", "a100-sxm-80g:8x128", 1536, 2048),
    ("llama3.1-405b", "h100-sxm:8x2048", 2048, 8192),
    ("mixtral-8x7b", "h100-sxm:8x16", 1024, 4096),
)


def distinct(model: CostModel) -> list[Choice]:
    """Return every configuration of the grid that the cluster holds."""
    found = []
    limit = model.cluster.num_devices
    powers = [2**k for k in range(11)]
    for tp, cp, dp, pp in product((1, 2, 4, 8), (1, 2, 4), powers, (1, 2, 4, 8, 16)):
        if tp * cp * dp * pp > limit:
            continue
        for zero, v, microbatch, family, level in product(range(4), (1, 2, 4), (1, 2, 4), FAMILIES, tuple(Recompute)):
            if (family == "interleaved") == (v > 1):
                degrees = Degrees(tp=tp, cp=cp, dp=dp, sp=tp > 1, vocab_parallel=tp > 1, zero=zero)
                found.append(Choice(degrees, pp, v, microbatch, family, level))
    return found


def measure(name: str, cluster: str, batch: int, length: int) -> dict[str, object]:
    """Return configurations a second of both paths and their largest relative difference."""
    profile, machines = resolve_model(name), resolve_cluster(cluster)
    job = TrainingJob(global_batch=batch, sequence_length=length)
    rows = distinct(CostModel(profile, machines, job))
    arrays = Choices.of(rows)
    times = -(-NUM_ROWS // len(rows))
    many = Choices(*(np.tile(getattr(arrays, part), times)[:NUM_ROWS] for part in Choices.__dataclass_fields__))
    estimate_all(CostModel(profile, machines, job), arrays)

    model = CostModel(profile, machines, job)
    start = time.process_time()
    found = estimate_all(model, many)
    compiled_s = time.process_time() - start

    finite = np.flatnonzero(np.isfinite(found.step_s[: len(rows)]))
    chosen = np.random.default_rng(0).choice(finite, NUM_COMPARED, replace=False)
    start = time.process_time()
    single = [estimate(model, rows[row]) for row in chosen]
    scalar_s = time.process_time() - start
    difference = max(
        max(abs(one.step_s / found.step_s[row] - 1), abs(one.peak_bytes / found.peak_bytes[row] - 1))
        for row, one in zip(chosen, single, strict=True)
    )
    return {
        "model": name,
        "cluster": cluster,
        "rows": len(many),
        "distinct": min(len(rows), len(many)),
        "compiled_per_s": len(many) / compiled_s,
        "scalar_per_s": NUM_COMPARED / scalar_s,
        "largest_relative_difference": float(difference),
    }


def main() -> int:
    """Measure every case, print and write the result; return 1 below a million a second or above 1e-9."""
    cases = [measure(*case) for case in CASES]
    for case in cases:
        print(
            f"{case['model']:<16}{case['cluster']:<22}{case['compiled_per_s']:>12,.0f} /s compiled"
            f"{case['scalar_per_s']:>8,.0f} /s scalar, difference {case['largest_relative_difference']:.1e}"
        )
    document = {**machine("python benchmarks/cost_throughput.py"), "cases": cases}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    good = all(case["compiled_per_s"] >= 1e6 and case["largest_relative_difference"] <= 1e-9 for case in cases)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
