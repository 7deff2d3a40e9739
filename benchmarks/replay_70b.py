"""A 64-rank plan for a 70B-class Llama, replayed rank by rank on one CUDA device: predicted against measured.

The model's layers are profiled at the plan's tensor degree, the plan (8 stages x 8 tensor-parallel ranks, sequence
parallel, bf16, 1F1B with 32 microbatches) is scored, and one device of each pipeline rank is replayed. Reported are the
errors of each action's seconds and of each rank's peak memory; the targets are 5 % and 3 %.

Usage: python benchmarks/replay_70b.py [--small] [--steps 3]
Writes benchmarks/results/replay_70b.json. With --small (4 ranks of a tiny Llama, for any machine) nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402
from stagewright.planner.catalog import resolve_cluster  # noqa: E402
from stagewright.planner.cost.even_plan import even_plan  # noqa: E402
from stagewright.planner.cost.step_time import Choice  # noqa: E402
from stagewright.planner.documents import Degrees, Optimizer, Recompute, TrainingJob  # noqa: E402
from stagewright.planner.prediction import with_prediction  # noqa: E402
from stagewright.profiler.model_profile import profile_model  # noqa: E402
from stagewright.runtime.run import run_plan  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "replay_70b.json"


@dataclass(frozen=True)
class Setting:
    """What is planned and replayed."""

    factory: str
    cluster: str
    device: str
    precision: str
    num_ranks: int
    tensor_degree: int
    num_microbatches: int
    sequence_length: int


FULL = Setting("llama_70b", "h100-sxm:8x8", "cuda", "bf16", 8, 8, 32, 4096)
SMALL = Setting("llama_small", "h100-sxm:4x1", "cpu", "fp32", 2, 2, 4, 64)


def llama_70b(num_layers: int = 80) -> nn.Module:
    """Return a model of Llama 3.1 70B's shape."""
    return _llama(
        num_layers, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip


def llama_small(num_layers: int = 6) -> nn.Module:
    """Return a Llama that any machine trains."""
    return _llama(
        num_layers, hidden_size=256, intermediate_size=896, num_attention_heads=8, num_key_value_heads=4, vocab_size=512
    )


def _llama(num_layers: int, **sizes: int) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=num_layers, max_position_embeddings=8192, use_cache=False, **sizes
    )
    return transformers.LlamaForCausalLM(config)


def main() -> int:
    """Run the benchmark and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--budget", type=float, default=30.0)
    arguments = parser.parse_args()
    setting = SMALL if arguments.small else FULL
    if setting.device == "cuda" and not torch.cuda.is_available():
        print("this machine has no CUDA device; --small runs anywhere")
        return 2
    rows = measure(setting, steps=arguments.steps, budget_s=arguments.budget)
    for row in rows["replayed"]:
        print(f"rank {row['rank']}: {json.dumps(row['actions'])} peak {json.dumps(row['peak_memory_bytes'])}")
    if not arguments.small:
        result = {**machine("python benchmarks/replay_70b.py"), **rows}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(setting: Setting, *, steps: int, budget_s: float) -> dict[str, object]:
    """Profile, plan and replay; return errors by action and rank."""
    model = f"{Path(__file__).resolve()}:{setting.factory}"
    profile = profile_model(
        model,
        microbatches=(1,),
        sequence_length=setting.sequence_length,
        tensor_degrees=(1, setting.tensor_degree),
        device=setting.device,
        dtype=setting.precision,
        optimizer="adamw",
        budget_s=budget_s,
    )
    cluster = resolve_cluster(setting.cluster)
    if setting.device == "cpu":
        group = cluster.groups[0]
        cpu = group.device.model_copy(update={"kind": "cpu", "reserved_bytes": 0.0})
        cluster = cluster.model_copy(update={"groups": (group.model_copy(update={"device": cpu}),)})
    job = TrainingJob(
        global_batch=setting.num_microbatches,
        sequence_length=setting.sequence_length,
        precision=setting.precision,
        optimizer=Optimizer.standard("adamw", setting.precision),
    )
    degrees = Degrees(tp=setting.tensor_degree, sp=True)
    choice = Choice(degrees, setting.num_ranks, 1, 1, "1f1b", Recompute.NONE)
    plan = with_prediction(even_plan(profile, cluster, job, choice), profile)
    report = run_plan(plan, profile, model=model, steps=steps, checks=(), replay="all")
    assert report.replayed is not None
    actions = [action["error"] for row in report.replayed for action in row["actions"].values()]
    peaks = [row["peak_memory_bytes"]["error"] for row in report.replayed]
    return {
        "model": setting.factory,
        "devices": plan.num_devices,
        "step_time_s": {"predicted": report.predicted["step_time_s"], "composed": report.measured["step_time_s"]},
        "largest_action_error": max(actions, key=abs),
        "largest_peak_error": max(peaks, key=abs),
        "replayed": report.replayed,
    }


if __name__ == "__main__":
    sys.exit(main())
