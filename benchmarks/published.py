"""Predicted against published: training runs whose configuration and speed were published.

Each row is turned into a complete plan with the published configuration pinned, and scored by the common simulator like
any other plan. What a paper leaves out is stated: SC'21 publishes neither microbatch nor chunks, so the fastest that
fits is taken. Efficiencies are the catalogue's; those of the A100 were fitted on the 22B and 175B rows of Korthikanti et
al. (and their table 4) only, so every other row is a prediction of runs the model has not seen.

    python benchmarks/published.py            prints the table and writes benchmarks/results/published.json
    python benchmarks/published.py --json     prints one JSON document and writes nothing
    python benchmarks/published.py --fit      fits the A100's efficiencies anew on the rows marked (fitted), with the
                                              error of each row when its model was held out
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from machine import machine

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.cost import LEVELS, CostModel
from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.fit import MeasuredRun, fit_runs
from stagewright.planner.cost.step_time import Choice, Family
from stagewright.planner.documents import Cluster, Degrees, ModelProfile, Optimizer, Plan, Recompute, TrainingJob
from stagewright.planner.planned_schedule import OPTIONS
from stagewright.planner.prediction import evaluate
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate, peak_activations

RESULT = Path(__file__).parent / "results" / "published.json"
GIB = 2.0**30
# Megatron's mixed precision: fp16 weights, gradients accumulated in fp32, Adam with fp32 master weights.
MEGATRON = Optimizer(name="adam", parameter_bytes=2, gradient_bytes=4, state_bytes=12)


@dataclass(frozen=True)
class Run:
    """One published run: its configuration, and what is pinned of it."""

    model: str
    device: str
    tp: int
    pp: int
    num_devices: int
    global_batch: int
    sequence_length: int = 2048
    microbatch: int | None = None
    chunks: int | None = None
    sp: bool = False
    recompute: Recompute = Recompute.FULL
    zero: int = 0
    cp: int = 1
    ep: int = 1
    precision: str = "fp16"
    optimizer: Optimizer = MEGATRON

    @property
    def dp(self) -> int:
        return self.num_devices // (self.tp * self.pp * self.cp)

    @property
    def degrees(self) -> Degrees:
        return Degrees(
            dp=self.dp,
            tp=self.tp,
            cp=self.cp,
            ep=self.ep,
            sp=self.sp,
            zero=self.zero,
            vocab_parallel=self.tp > 1,
        )

    def cluster(self) -> Cluster:
        """Return nodes of eight of the device."""
        return resolve_cluster(f"{self.device}:{min(8, self.num_devices)}x{max(1, self.num_devices // 8)}")

    def job(self) -> TrainingJob:
        """Return the training job."""
        return TrainingJob.from_object(
            {
                "global_batch": self.global_batch,
                "sequence_length": self.sequence_length,
                "precision": self.precision,
                "optimizer": self.optimizer.model_dump(),
            }
        )

    def describe(self) -> str:
        """Return the configuration in one line."""
        parts = [f"t{self.tp} p{self.pp} d{self.dp}", f"batch {self.global_batch}"]
        if self.cp > 1:
            parts.append(f"cp {self.cp}")
        parts += [f"microbatch {self.microbatch}", f"chunks {self.chunks}", f"recompute {self.recompute}"]
        return ", ".join([*parts, *(["sp"] if self.sp else []), *([f"zero {self.zero}"] if self.zero else [])])


@dataclass(frozen=True)
class Comparison:
    """One number, predicted and published."""

    source: str
    row: str
    quantity: str
    unit: str
    configuration: str
    predicted: float
    published: float
    fitted: bool = False

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        return self.predicted / self.published - 1.0


def published_plan(run: Run, profile: ModelProfile, cluster: Cluster, job: TrainingJob) -> Plan:
    """Return the plan of a run: equal blocks on every virtual stage, embedding on the first, norm, head, loss on the last."""
    assert run.microbatch is not None
    assert run.chunks is not None
    family: Family = "1f1b" if run.chunks == 1 else "interleaved"
    choice = Choice(run.degrees, run.pp, run.chunks, run.microbatch, family, run.recompute)
    return even_plan(profile, cluster, job, choice, planner="published")


def predict(run: Run) -> tuple[Run, float]:
    """Return the run with microbatch and chunks filled in, and its step seconds; the fastest where they are open."""
    profile, cluster, job = resolve_model(run.model), run.cluster(), run.job()
    best: tuple[Run, float] | None = None
    for candidate in completions(run, profile):
        prediction = evaluate(published_plan(candidate, profile, cluster, job), profile).prediction
        fits = max(prediction.peak_memory_bytes) <= cluster.groups[0].device.memory_bytes
        is_open = run.microbatch is None or run.chunks is None
        if is_open and not fits:
            continue
        if best is None or prediction.step_time_s < best[1]:
            best = candidate, prediction.step_time_s
    if best is None:
        raise SystemExit(f"{run.model}: no microbatch and chunks fit")
    return best


def completions(run: Run, profile: ModelProfile) -> Iterator[Run]:
    """Return the run with every microbatch and number of chunks that its batch and layers allow."""
    blocks = sum(profile.classes[name].kind == "block" for name in profile.layer_classes)
    microbatches = [run.microbatch] if run.microbatch else [1, 2, 4, 8, 16, 32]
    chunks = [run.chunks] if run.chunks else [v for v in range(1, blocks // run.pp + 1) if run.pp > 1 or v == 1]
    for microbatch in microbatches:
        if run.global_batch % (run.dp * microbatch):
            continue
        count = run.global_batch // (run.dp * microbatch)
        for v in chunks:
            if run.chunks is None and blocks % (run.pp * v):
                continue
            if v > 1 and count % run.pp:
                continue
            yield replace(run, microbatch=microbatch, chunks=v)


KORTHIKANTI = "Korthikanti et al. 2022"
# model, t, p, batch, microbatch, chunks, seconds with full recomputation, with sequence parallelism and selective
KORTHIKANTI_TIMES = (
    ("megatron-22b", 8, 1, 4, 4, 1, 1.42, 1.10, True),
    ("gpt3-175b", 8, 8, 64, 1, 3, 18.13, 13.75, True),
    ("megatron-530b", 8, 35, 280, 1, 3, 49.05, 37.83, False),
    ("megatron-1t", 8, 64, 512, 1, 1, 94.42, 71.49, False),
)
# model, states GiB, activations GiB without recomputation and with both, percent of none: SP, selective, both, full
KORTHIKANTI_MEMORY = (
    ("megatron-22b", 45.56, 59.25, 9.56, (66.84, 49.42, 16.18, 7.64)),
    ("gpt3-175b", 45.56, 66.84, 12.35, (62.04, 56.53, 18.49, 8.71)),
)
NARAYANAN = "Narayanan et al. SC 2021"
# name, heads, h, layers, t, p, GPUs, batch, TFLOP/s per GPU, listed among the rows to meet
NARAYANAN_ROWS = (
    ("1.7b", 2304, 24, 1, 1, 32, 512, 137.0),
    ("3.6b", 3072, 30, 2, 1, 64, 512, 138.0),
    ("7.5b", 4096, 36, 4, 1, 128, 512, 142.0),
    ("18.4b", 6144, 40, 8, 1, 256, 1024, 135.0),
    ("39.1b", 8192, 48, 8, 2, 512, 1536, 138.0),
    ("76.1b", 10240, 60, 8, 4, 1024, 1792, 140.0),
    ("145.6b", 12288, 80, 8, 8, 1536, 2304, 148.0),
    ("310.1b", 16384, 96, 8, 16, 1920, 2160, 155.0),
    ("529.6b", 20480, 105, 8, 35, 2520, 2520, 163.0),
    ("1008b", 25600, 128, 8, 64, 3072, 3072, 163.0),
)


def korthikanti_run(model: str, *, full: bool) -> Run:
    """Return the run of a row, with full recomputation or with sequence parallelism and selective recomputation."""
    _, t, p, batch, microbatch, chunks, *_ = next(row for row in KORTHIKANTI_TIMES if row[0] == model)
    return Run(
        model,
        "a100-sxm-80g",
        tp=t,
        pp=p,
        num_devices=t * p,
        global_batch=batch,
        microbatch=microbatch,
        chunks=chunks,
        sp=not full,
        recompute=Recompute.FULL if full else Recompute.SELECTIVE,
    )


def korthikanti_times() -> Iterator[Comparison]:
    """Return iteration seconds of every row of table 5."""
    for model, *_, full_s, selective_s, fitted in KORTHIKANTI_TIMES:
        for full, published in ((True, full_s), (False, selective_s)):
            run, seconds = predict(korthikanti_run(model, full=full))
            name = f"{model} {'full' if full else 'SP+selective'}"
            yield Comparison(KORTHIKANTI, name, "iteration", "s", run.describe(), seconds, published, fitted)


def layer_activations(model: str, *, sp: bool, recompute: Recompute) -> float:
    """Return the bytes the first pipeline rank keeps for its transformer layers at its peak, which is what the paper counts."""
    run = replace(korthikanti_run(model, full=True), sp=sp, recompute=recompute)
    profile, cluster, job = resolve_model(model), run.cluster(), run.job()
    assert run.microbatch is not None
    assert run.chunks is not None
    count = run.global_batch // run.microbatch
    name = "1f1b" if run.chunks == 1 else "interleaved"
    live = float(peak_activations(generate(name, ScheduleRequest(run.pp, count, num_chunks=run.chunks)))[0])
    table = CostModel(profile, cluster, job, OPTIONS).table(run.degrees, run.microbatch)
    blocks = [index for index, name in enumerate(profile.layer_classes) if profile.classes[name].kind == "block"]
    return float(table.activation_bytes[LEVELS.index(recompute), blocks[0]]) * len(blocks) / run.pp * live


def mean_states(model: str) -> float:
    """Return the bytes of parameters, gradients and optimizer of a device, the mean over all of them."""
    run = korthikanti_run(model, full=True)
    profile, job = resolve_model(model), run.job()
    cost = CostModel(profile, run.cluster(), job, OPTIONS)
    table = cost.table(run.degrees, run.microbatch or 1)
    tied = sum(tie.num_parameters / run.tp for tie in profile.tied) if run.pp == 1 else 0.0
    return cost.states(float(table.dense_parameters.sum()) - tied, 0.0, run.degrees).total / run.pp


def korthikanti_memory() -> Iterator[Comparison]:
    """Return states and activations."""
    for model, states, none, both, percent in KORTHIKANTI_MEMORY:
        text = f"t{8}, 18 bytes a parameter"
        yield Comparison(KORTHIKANTI, model, "states", "GiB", text, mean_states(model) / GIB, states)
        reference = layer_activations(model, sp=False, recompute=Recompute.NONE)
        yield Comparison(
            KORTHIKANTI, model, "activations, none", "GiB", "peak of the first rank", reference / GIB, none
        )
        cases = (
            ("SP", True, Recompute.NONE),
            ("selective", False, Recompute.SELECTIVE),
            ("SP+selective", True, Recompute.SELECTIVE),
            ("full", False, Recompute.FULL),
        )
        for (name, sp, level), share in zip(cases, percent, strict=True):
            size = layer_activations(model, sp=sp, recompute=level)
            if name == "SP+selective":
                yield Comparison(
                    KORTHIKANTI, model, f"activations, {name}", "GiB", "peak of the first rank", size / GIB, both
                )
            yield Comparison(KORTHIKANTI, model, f"activations, {name}", "% of none", "", 100 * size / reference, share)


def narayanan_rows() -> Iterator[Comparison]:
    """Return achieved TFLOP/s per GPU of table 1; their FLOPs count the recomputation."""
    for name, h, layers, t, p, gpus, batch, published in NARAYANAN_ROWS:
        run, seconds = predict(
            Run(f"megatron-{name}", "a100-sxm-80g", tp=t, pp=p, num_devices=gpus, global_batch=batch)
        )
        s, vocabulary = 2048, 51200
        flops = 96 * batch * s * layers * h**2 * (1 + s / (6 * h) + vocabulary / (16 * layers * h))
        predicted = flops / gpus / seconds / 1e12
        yield Comparison(NARAYANAN, f"megatron-{name}", "speed", "TFLOP/s", run.describe(), predicted, published)


OTHERS = "Other models and devices, fitted on none"


def other_rows() -> Iterator[Comparison]:
    """Return TFLOP/s per GPU of BLOOM (Le Scao et al. 2022) and Llama 3 405B (Grattafiori et al. 2024, table 4).

    BLOOM's count the recomputation, as SC'21's do; Llama's are model FLOPs, 6 for each parameter that multiplies and token, and full attention.
    """
    h, layers, s, vocabulary, batch, gpus = 14336, 70, 2048, 250880, 2048, 384
    bloom = Run(
        "bloom-176b", "a100-sxm-80g", tp=4, pp=12, num_devices=gpus, global_batch=batch, microbatch=2, chunks=1,
        zero=1, precision="bf16",
    )  # fmt: skip
    run, seconds = predict(bloom)
    flops = 96 * batch * s * layers * h**2 * (1 + s / (6 * h) + vocabulary / (16 * layers * h))
    yield Comparison(OTHERS, "bloom-176b", "speed", "TFLOP/s", run.describe(), flops / gpus / seconds / 1e12, 150.0)
    tokens, multiplying = 2048 * 8192, 405.85e9 - 128256 * 16384
    flops = tokens * (6 * multiplying + 12 * 126 * 16384 * 8192)
    for gpus, published in ((8192, 430.0), (16384, 400.0)):
        llama = Run(
            "llama3.1-405b", "h100-sxm", tp=8, pp=16, num_devices=gpus, global_batch=2048, sequence_length=8192,
            microbatch=1, chunks=4, sp=True, recompute=Recompute.NONE, zero=1, precision="bf16",
        )  # fmt: skip
        run, seconds = predict(llama)
        predicted = flops / gpus / seconds / 1e12
        yield Comparison(OTHERS, f"llama3-405b {gpus}", "speed", "TFLOP/s", run.describe(), predicted, published)


def comparisons() -> list[Comparison]:
    """Return every comparison, in the order of the papers."""
    return [*korthikanti_times(), *korthikanti_memory(), *narayanan_rows(), *other_rows()]


# What the rows of the project's own notes must meet: (source, quantity starts with, rows, mean, worst)
LISTED = {
    "Korthikanti iteration": (KORTHIKANTI, "iteration", ("megatron-22b", "gpt3-175b")),
    "Korthikanti states": (KORTHIKANTI, "states", ("megatron-22b", "gpt3-175b")),
    "Korthikanti activations": (KORTHIKANTI, "activations", ("megatron-22b", "gpt3-175b")),
    "SC'21, four rows": (NARAYANAN, "speed", ("megatron-1.7b", "megatron-7.5b", "megatron-39.1b", "megatron-145.6b")),
    "SC'21, all ten rows": (NARAYANAN, "speed", ()),
    "Korthikanti iteration, rows not fitted": (KORTHIKANTI, "iteration", ("megatron-530b", "megatron-1t")),
    "BLOOM and Llama 3 405B": (OTHERS, "speed", ()),
}


def summary(rows: Sequence[Comparison]) -> dict[str, dict[str, float]]:
    """Return mean and worst absolute error of each group of rows."""
    result = {}
    for name, (source, quantity, models) in LISTED.items():
        errors = [
            abs(row.error)
            for row in rows
            if row.source == source
            and row.quantity.startswith(quantity)
            and (not models or row.row.split()[0] in models)
        ]
        result[name] = {"rows": len(errors), "mean": sum(errors) / len(errors), "worst": max(errors)}
    return result


def document(rows: Sequence[Comparison]) -> dict[str, object]:
    """Return the JSON document of the result."""
    return {
        **machine("python benchmarks/published.py"),
        "rows": [
            {
                "source": row.source,
                "row": row.row,
                "quantity": row.quantity,
                "unit": row.unit,
                "configuration": row.configuration,
                "predicted": row.predicted,
                "published": row.published,
                "error": row.error,
                "used_for_fitting": row.fitted,
            }
            for row in rows
        ],
        "summary": summary(rows),
    }


def show(rows: Sequence[Comparison]) -> None:
    """Print the comparison as a table."""
    source = ""
    for row in rows:
        if row.source != source:
            source = row.source
            print(f"\n{source}")
            print(f"{'row':<28}{'quantity':<28}{'predicted':>10}{'published':>10}{'error':>8}  configuration")
        mark = " (fitted)" if row.fitted else ""
        print(
            f"{row.row:<28}{row.quantity + ', ' + row.unit:<28}{row.predicted:>10.4g}{row.published:>10.4g}"
            f"{100 * row.error:>7.1f}%  {row.configuration}{mark}"
        )
    print(f"\n{'errors':<44}{'rows':>5}{'mean':>8}{'worst':>8}")
    for name, group in summary(rows).items():
        print(f"{name:<44}{group['rows']:>5}{100 * group['mean']:>7.2f}%{100 * group['worst']:>7.2f}%")


def fit_again() -> dict[str, object]:
    """Return what `cost fit` finds on the rows that were used for fitting: factors on the catalogue's efficiencies."""
    runs = []
    for model, *_, full_s, selective_s, fitted in KORTHIKANTI_TIMES:
        for full, published in ((True, full_s), (False, selective_s)):
            if fitted:
                run, profile = korthikanti_run(model, full=full), resolve_model(model)
                plan = published_plan(run, profile, run.cluster(), run.job())
                runs.append(
                    MeasuredRun(f"{model} {'full' if full else 'SP+selective'}", plan, profile, published, model)
                )
    return fit_runs(runs).to_json()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit code."""
    parser = argparse.ArgumentParser(description="Predicted against published training runs.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--fit", action="store_true", help="fit anew, with cross-validated errors")
    options = parser.parse_args(arguments)
    if options.fit:
        print(json.dumps(fit_again(), indent=1))
        return 0
    rows = comparisons()
    if options.json:
        print(json.dumps(document(rows), indent=1))
        return 0
    show(rows)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(document(rows), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
