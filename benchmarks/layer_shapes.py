"""Layers of Llama 2 70B measured on this device, beside what the analytic model says of them.

Every combination of tensor degree 1, 2, 4, 8, microbatch 1, 2, 4 and sequence 2,048 and 8,192 is profiled in bf16 at the
shard's real shapes, without recomputation, with selective and with full; the model is shortened to the layers that hold
every class. The profile is kept with its pedigree under profiles/. Compared are the seconds of one block's forward and
backward, at each level of recomputation, and the bytes it keeps; exchanges between shards are left out on both sides.

Usage: python benchmarks/layer_shapes.py [--size 70b|tiny] [--device auto] [--budget 420] [--out FOLDER]
Writes profiles/llama2-70b-DEVICE.json and benchmarks/results/layer_shapes.json; `tiny` is for a look on any machine and
keeps nothing unless told where.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402
from stagewright.planner.catalog import resolve_cluster, resolve_model  # noqa: E402
from stagewright.planner.cost.cost_model import CostModel  # noqa: E402
from stagewright.planner.cost.layer_table import LEVELS  # noqa: E402
from stagewright.planner.documents import Cluster, Degrees, ModelProfile, TrainingJob  # noqa: E402
from stagewright.planner.errors import InvalidArgument  # noqa: E402
from stagewright.profiler.model_profile import profile_model  # noqa: E402
from stagewright.profiler.settings import device_of  # noqa: E402


@dataclass(frozen=True)
class Size:
    """A model and the grid it is measured over."""

    config: dict[str, object]
    microbatches: tuple[int, ...]
    sequence_lengths: tuple[int, ...]
    tensor_degrees: tuple[int, ...]
    name: str


_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
SIZES = {
    "70b": Size(
        {
            **_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 8192,
        },
        (1, 2, 4), (2048, 8192), (1, 2, 4, 8), "llama2-70b",
    ),
    "tiny": Size(
        {
            **_LLAMA, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 64,
        },
        (1, 2), (16, 32), (1, 2), "llama-tiny",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One block in one configuration at one level: measured and analytic."""

    tensor_degree: int
    microbatch: int
    sequence_length: int
    recompute: str
    measured_forward_s: float
    analytic_forward_s: float
    measured_backward_s: float
    analytic_backward_s: float
    measured_kept_bytes: float
    analytic_kept_bytes: float

    @property
    def time_error(self) -> float:
        """Analytic over measured seconds of forward and backward, less one."""
        measured = self.measured_forward_s + self.measured_backward_s
        return (self.analytic_forward_s + self.analytic_backward_s) / measured - 1


def main(arguments: list[str] | None = None) -> int:
    """Measure, compare, print the table and keep both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="70b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget", type=float, default=420.0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    device = device_of(options.device)
    if options.size == "70b" and device.type != "cuda":
        parser.error("the layers of 70b need a CUDA device with 80 GB; --size tiny runs anywhere")
    size = SIZES[options.size]
    profile = measure(size, str(device), options.budget)
    rows = compare(profile, analytic(size), cluster_of(device))
    for row in rows:
        shape = f"tp {row.tensor_degree} b {row.microbatch} s {row.sequence_length:5d} {row.recompute:9s}"
        print(
            f"{shape} forward {row.measured_forward_s * 1e3:8.3f} ms, analytic {row.analytic_forward_s * 1e3:8.3f}; "
            f"backward {row.measured_backward_s * 1e3:8.3f}, {row.analytic_backward_s * 1e3:8.3f} ({row.time_error:+.1%}); "
            f"kept {row.measured_kept_bytes / 2**20:8.1f} MiB, {row.analytic_kept_bytes / 2**20:8.1f}"
        )
    print(f"median |error| of a block's seconds {statistics.median(abs(row.time_error) for row in rows):.1%}")
    keep(size, profile, rows, options.out if options.out or options.size == "tiny" else ROOT)
    return 0


def measure(size: Size, device: str, budget_s: float) -> ModelProfile:
    """Return the measured profile of the model's layers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / size.name / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps(size.config))
        return profile_model(
            str(path),
            microbatches=size.microbatches,
            sequence_length=size.sequence_lengths,
            tensor_degrees=size.tensor_degrees,
            device=device,
            dtype="bf16",
            budget_s=budget_s,
        )


def analytic(size: Size) -> ModelProfile:
    """Return the same model priced by its operators alone."""
    return resolve_model(size.config)


def cluster_of(device: torch.device) -> Cluster:
    """Return eight of this device with links that cost nothing, so that only compute is compared."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else "h100"
    cluster = resolve_cluster(
        f"{'h200-sxm' if 'h200' in name else 'a100-sxm-80g' if 'a100' in name else 'h100-sxm'}:8x1"
    )
    group = cluster.groups[0]
    free = tuple(
        level.model_copy(update={"latency_s": 0.0, "bytes_per_s": 1e18, "segments": (), "collectives": {}})
        for level in group.links
    )
    return cluster.model_copy(update={"groups": (group.model_copy(update={"links": free}),)})


def compare(measured: ModelProfile, priced: ModelProfile, cluster: Cluster) -> list[Row]:
    """Return a row for each measured configuration of the block and each level it offers."""
    block = next(name for name, value in measured.classes.items() if value.kind == "block")
    rows = []
    for cost in measured.classes[block].costs:
        job = TrainingJob(global_batch=cost.microbatch, sequence_length=cost.sequence_length)
        degrees = Degrees(tp=cost.tensor_degree)
        tables = [
            CostModel(profile, cluster, job).shape_table(degrees, cost.microbatch) for profile in (measured, priced)
        ]
        places = [_first_block(profile) for profile in (measured, priced)]
        for index, level in enumerate(LEVELS):
            if level not in cost.activation_bytes:
                continue
            values = [
                (
                    float(table.forward_s[place]),
                    float(table.input_grad_s[place] + table.weight_grad_s[place] + table.recompute_s[index, place]),
                    float(table.activation_bytes[index, place]),
                )
                for table, place in zip(tables, places, strict=True)
            ]
            (forward, backward, kept), (forward_said, backward_said, kept_said) = values
            rows.append(
                Row(
                    cost.tensor_degree, cost.microbatch, cost.sequence_length, level.value,
                    forward, forward_said, backward, backward_said, kept, kept_said,
                )
            )  # fmt: skip
    return rows


def keep(size: Size, profile: ModelProfile, rows: list[Row], folder: Path | None) -> None:
    """Write the profile and the comparison under a folder."""
    if folder is None:
        return
    device = re.sub(r"[^a-z0-9]+", "-", profile.pedigree.device.lower()).strip("-")
    profiles, results = folder / "profiles", folder / "benchmarks" / "results"
    for place in (profiles, results):
        place.mkdir(parents=True, exist_ok=True)
    profile.save(profiles / f"{size.name}-{device}.json")
    result = {
        **machine("python benchmarks/layer_shapes.py"),
        "device": profile.pedigree.device,
        "versions": profile.pedigree.versions,
        "warnings": list(profile.pedigree.warnings),
        "rows": [{**asdict(row), "time_error": row.time_error} for row in rows],
    }
    (results / "layer_shapes.json").write_text(json.dumps(result, indent=1) + "\n")


def _first_block(profile: ModelProfile) -> int:
    for index, name in enumerate(profile.layer_classes):
        if profile.classes[name].kind == "block":
            return index
    raise InvalidArgument(f"{profile.name} has no block", field="model")


if __name__ == "__main__":
    sys.exit(main())
