"""How well a profile alone predicts single-device training: step time and peak memory, nothing fitted.

For each model, five times: train it with a plain loop that knows nothing of layers, profile it (one busy rank), train it
again. A run's error is that of the profile's step against the mean of the two trainings around it, each the median of
several steps, since a shared machine's speed changes within seconds; both keep freed memory, as the ranks of a run do.
Reported are the median error of the runs with their spread, the error against the loop's own processor time (what remains
when other programs shared the machine), the error of the peak, and (I + W) / B, the deferred backward against the fused
one. On CUDA the device's clock and allocator are used.

Usage: python benchmarks/profile_accuracy.py [MODEL ...] [--device auto] [--runs 5] [--budget 8]
Writes benchmarks/results/profile_accuracy.json; some models take the place of their rows there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402
from stagewright.modeling import call_model  # noqa: E402
from stagewright.modeling.kept_memory import keep_freed_memory  # noqa: E402
from stagewright.profiler.memory_trace import peak_above_start  # noqa: E402
from stagewright.profiler.model_bench import Configuration, ModelBench  # noqa: E402
from stagewright.profiler.model_profile import profile_model  # noqa: E402
from stagewright.profiler.model_source import ModelSource  # noqa: E402
from stagewright.profiler.settings import device_of  # noqa: E402
from stagewright.profiler.single_device import predict_single_device  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "profile_accuracy.json"
NUM_MICROBATCHES = 4
MICROBATCH = 2
SEQUENCE_LENGTH = 128

_SIZES = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "vocab_size": 4096,
}
CONFIGS: dict[str, dict[str, object]] = {
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 4, "n_embd": 384, "n_head": 6,
        "vocab_size": 4096, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0,
    },
    "llama": {**_SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2},
    "mixtral": {
        **_SIZES, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_key_value_heads": 2,
        "num_local_experts": 4, "intermediate_size": 768,
    },
    "bert": {**_SIZES, "model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "vit": {
        **_SIZES, "model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 128, "patch_size": 16,
    },
    "resnet": {
        "model_type": "resnet", "architectures": ["ResNetForImageClassification"], "embedding_size": 32,
        "hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2], "layer_type": "basic",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One model's result, a number for each run; errors are predicted / measured - 1, `step_error` is their median."""

    model: str
    predicted_step_s: list[float]
    measured_step_s: list[float]
    step_errors: list[float]
    step_error: float
    own_time_error: float
    predicted_peak_bytes: float
    measured_peak_bytes: float
    peak_error: float
    split_over_fused: float
    profile_s: float
    warnings: list[str]


def main() -> int:
    """Run the benchmark and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"example, {', '.join(CONFIGS)}; all unless told")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--budget", type=float, default=8.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # a run's ranks do, whose steps a profile foretells
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models or ["example", *CONFIGS]:
            row = measure(name, reference(name, Path(folder)), arguments.device, arguments.runs, arguments.budget)
            rows.append(row)
            print(
                f"{name:8s} step {statistics.median(row.predicted_step_s) * 1e3:7.1f} ms, measured "
                f"{statistics.median(row.measured_step_s) * 1e3:7.1f}, error {row.step_error:+.1%} "
                f"({min(row.step_errors):+.1%} to {max(row.step_errors):+.1%}), of own time {row.own_time_error:+.1%}; "
                f"peak error {row.peak_error:+.2%}; (I + W) / B {row.split_over_fused:.2f}; "
                f"profiled in {row.profile_s:.0f} s",
                flush=True,
            )
    known = json.loads(RESULT.read_text())["rows"] if arguments.models and RESULT.exists() else []
    merged = {row["model"]: row for row in (*known, *(asdict(row) for row in rows))}
    result = {**machine("python benchmarks/profile_accuracy.py"), "rows": list(merged.values())}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def reference(name: str, folder: Path) -> str:
    """Return the model's reference, with its configuration written where it needs one."""
    if name == "example":
        return f"{ROOT / 'examples' / 'gpt.py'}:build"
    path = folder / name / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(CONFIGS[name]))
    return str(path)


def measure(name: str, model: str, device_choice: str, runs: int, budget_s: float) -> Row:
    """Train a model, profile it, train it again, and compare; so many times."""
    device = device_of(device_choice)
    source = ModelSource(model)
    step = plain_step(source, device)
    for _ in range(2):
        step()
    predicted, measured, own, durations = [], [], [], []
    before = timed(step, device)
    for _ in range(runs):
        began = time.perf_counter()
        profile = profile_model(
            model,
            microbatches=(MICROBATCH,),
            sequence_length=SEQUENCE_LENGTH,
            device=device_choice,
            optimizer="sgd-momentum",
            budget_s=budget_s,
        )
        durations.append(time.perf_counter() - began)
        predicted.append(
            predict_single_device(
                profile,
                (MICROBATCH, SEQUENCE_LENGTH, 1),
                num_microbatches=NUM_MICROBATCHES,
                parameter_bytes=4,
                state_bytes=4,
            )
        )
        after = timed(step, device)
        measured.append((before[0] + after[0]) / 2)
        own.append((before[1] + after[1]) / 2)
        before = after
    used = profile.num_parameters - sum(profile.classes[name].unused_parameters for name in profile.layer_classes)
    peak = 4 * (profile.num_parameters + used) + peak_above_start(step, device)
    errors = [each.step_s / wall - 1 for each, wall in zip(predicted, measured, strict=True)]
    return Row(
        model=name,
        predicted_step_s=[each.step_s for each in predicted],
        measured_step_s=measured,
        step_errors=errors,
        step_error=statistics.median(errors),
        own_time_error=statistics.median(each.step_s / busy - 1 for each, busy in zip(predicted, own, strict=True)),
        predicted_peak_bytes=predicted[-1].peak_bytes,
        measured_peak_bytes=peak,
        peak_error=predicted[-1].peak_bytes / peak - 1,
        split_over_fused=split_over_fused(source, device),
        profile_s=statistics.median(durations),
        warnings=list(profile.pedigree.warnings),
    )


def plain_step(source: ModelSource, device: torch.device) -> Callable[[], None]:
    """Return one training step of the whole model, written as anyone would."""
    model = source.build(device=device, dtype=torch.float32)
    batches = [source.batch(model, MICROBATCH, SEQUENCE_LENGTH, device) for _ in range(NUM_MICROBATCHES)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        for batch in batches:
            (call_model(model, batch) / NUM_MICROBATCHES).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(step: Callable[[], None], device: torch.device, steps: int = 7) -> tuple[float, float]:
    """Return the median (wall, own processor) seconds of a step; on CUDA both are the device's."""
    wall, own = [], []
    for _ in range(steps):
        first, busy = time.perf_counter(), time.thread_time()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall.append(time.perf_counter() - first)
        own.append(wall[-1] if device.type == "cuda" else time.thread_time() - busy)
    return statistics.median(wall), statistics.median(own)


def split_over_fused(source: ModelSource, device: torch.device, repeats: int = 5) -> float:
    """Return (I + W) / B: the backward with deferred weight gradients against the fused one, taken in turns."""
    chain = source.split(source.build(device=device, dtype=torch.float32))
    bench = ModelBench(source, chain, device, "sgd-momentum", own_time=True)
    configuration = Configuration(MICROBATCH, SEQUENCE_LENGTH)
    bench.warm_up(configuration)
    ratios = []
    for _ in range(repeats):
        fused = bench.measure(configuration, "step")
        split = bench.measure(configuration, "split")
        ratios.append((sum(split["input_grad_s"]) + sum(split["weight_grad_s"])) / sum(fused["backward_s"]))
    return statistics.median(ratios)


if __name__ == "__main__":
    sys.exit(main())
