"""How close executed steps are to simulated ones, and to torch's own pipeline runtime.

emulated   4 ranks on gloo, 12 schedules, actions that wait 20 ms: measured over simulated, and measured over torch's
           runtime on the same schedule in interleaved pairs; targets: median at most 1.04, and the lower end of the 95 %
           interval of the mean ratio to torch at most 1.00.
real       2 ranks, 20 plans of the example GPT and a Hugging Face Llama: step-time error (target: median absolute at most
           5 %), peak memory (3 %), bytes sent (exact). Runs and profiles take turns, and `step_error` is that of the mean of what
           the profiles right before and right behind a run predict, `step_error_before` that of the first alone, with which
           the plan was made: a machine drifts within a minute. `profiles_apart` says by how much. Errors are those of the expected
           step, `simulated_step_error_before` that of the simulation of medians, without what messages take of the processors
           and jitter adds. `step_error_at_speed` is the error, step by step, at the speed that the ranks' probes saw.
           A run whose steps differ by more than 8 % (80th over 20th percentile), or beside which other programs took more than
           3 % of the processors (`others_share`), is made again, `--runs` times in all; the row says how often.

asynchronous  2 ranks, the example GPT under each schedule whose weights change under microbatches: step-time error, and
           what it is without the seconds that versions of the weights take.

Usage: python benchmarks/runtime_fidelity.py [emulated|real|asynchronous ...] [--pairs 20] [--action-ms 20] [--steps 10]
           [--schedules A,B] [--models gpt,llama] [--microbatches 1,2] [--runs 3]
Each row is written to benchmarks/results/runtime_fidelity.json as soon as it is measured, in place of that plan's there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402
from stagewright.planner.catalog import resolve_cluster  # noqa: E402
from stagewright.planner.cost.even_plan import even_plan  # noqa: E402
from stagewright.planner.cost.step_time import Choice  # noqa: E402
from stagewright.planner.documents import (  # noqa: E402
    Cluster,
    ConfigurationCost,
    Degrees,
    LayerClass,
    LayerRun,
    ModelProfile,
    Optimizer,
    Plan,
    RankMapping,
    Recompute,
    ScheduleSpec,
    Source,
    StagePlan,
    TrainingJob,
)
from stagewright.planner.prediction import evaluate, with_prediction  # noqa: E402
from stagewright.planner.schedules.family import ScheduleRequest  # noqa: E402
from stagewright.planner.schedules.registry import generate  # noqa: E402
from stagewright.profiler.model_bench import OptimizerName  # noqa: E402
from stagewright.runtime.program import program_of  # noqa: E402
from stagewright.runtime.report import MEMORY_LIMIT, RunReport  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "runtime_fidelity.json"
NUM_RANKS, NUM_MICROBATCHES = 4, 8
SCHEDULES = (
    "gpipe", "1f1b", "interleaved", "breadth-first", "zb-h1", "zb-h2", "zb-v", "v-half", "v-min", "wave",
    "dualpipe-v", "interleaved-zb",
)  # fmt: skip
REAL_SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")
TWO_CHUNKS = ("interleaved", "breadth-first", "zb-v", "v-half", "v-min", "dualpipe-v", "interleaved-zb")
ASYNCHRONOUS: dict[str, tuple[int, dict[str, int]]] = {  # microbatches of an update or a pipeline, parameters
    "pipedream": (8, {}), "2bw": (4, {"updates": 2}), "wpipe": (4, {"updates": 2}), "ampnet": (8, {}),
    "spectrain": (8, {}), "xpipe": (4, {"updates": 2}), "pipemare": (4, {"updates": 2}), "avgpipe": (4, {}),
}  # fmt: skip
MODELS = {
    "gpt": f"{ROOT / 'examples' / 'gpt.py'}:build_untied",
    "llama": f"{Path(__file__).resolve()}:llama",
}
MOST_UNSTEADINESS, MOST_OTHERS = 0.08, 0.03
Row = dict[str, Any]


def main() -> int:
    """Run the parts and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--action-ms", type=float, default=20.0)
    parser.add_argument("--schedules", default="", help="some of them")
    parser.add_argument("--models", default=",".join(MODELS), help="some of them")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--budget", type=float, default=10.0)
    parser.add_argument("--microbatches", default="1,2", help="some of them")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    chosen = tuple(arguments.schedules.split(",")) if arguments.schedules else ()
    results = Results(RESULT, "python benchmarks/runtime_fidelity.py " + " ".join(sys.argv[1:]))
    if "emulated" in parts:
        for row in emulated(chosen or SCHEDULES, arguments.pairs, arguments.action_ms / 1e3):
            results.keep("emulated", row)
    if "real" in parts:
        names = arguments.models.split(",")
        sizes = [int(text) for text in arguments.microbatches.split(",")]
        for row in real(names, chosen or REAL_SCHEDULES, sizes, arguments.steps, arguments.budget, arguments.runs):
            results.keep("real", row)
    if "asynchronous" in parts:
        for microbatch in map(int, arguments.microbatches.split(",")):
            for row in asynchronous(chosen or tuple(ASYNCHRONOUS), microbatch, arguments.steps, arguments.budget):
                results.keep("asynchronous", row)
    return 0


class Results:
    """The result file; each row is in it as soon as it is measured, in place of an older one of the same plan."""

    def __init__(self, path: Path, command: str) -> None:
        self._path = path
        self._machine = machine(command)
        known = json.loads(path.read_text()) if path.exists() else {}
        self._parts: dict[str, list[Row]] = {part: known[part]["rows"] for part in PARTS if part in known}

    def keep(self, part: str, row: Row) -> None:
        """Take in a row and write the file."""
        dated = {**row, "date": self._machine["date"]}
        rows = {tuple(each[name] for name in PARTS[part][0]): each for each in (*self._parts.get(part, ()), dated)}
        self._parts[part] = list(rows.values())
        told = {name: {**PARTS[name][1](rows), "rows": rows} for name, rows in self._parts.items()}
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({**self._machine, **told}, indent=1) + "\n")
        partial.replace(self._path)


def _of_emulated(rows: Sequence[Row]) -> Row:
    low, high = _interval([ratio for row in rows for ratio in row["ratios"]])
    return {
        "median_over_simulated": statistics.median(row["over_simulated"] for row in rows),
        "over_torch_low": low,
        "over_torch_high": high,
    }


def _of_real(rows: Sequence[Row]) -> Row:
    def absolute(name: str) -> float:
        return statistics.median(abs(row[name]) for row in rows)

    return {
        "median_absolute_step_error": absolute("step_error"),
        "median_step_error": statistics.median(row["step_error"] for row in rows),
        "median_absolute_step_error_before": absolute("step_error_before"),
        "median_absolute_step_error_at_speed": absolute("step_error_at_speed"),
        "median_step_error_at_speed": statistics.median(row["step_error_at_speed"] for row in rows),
        "median_absolute_simulated_step_error_before": absolute("simulated_step_error_before"),
        "largest_peak_error": max((row["peak_error"] for row in rows), key=abs),
        "num_peaks_within_limit": sum(abs(row["peak_error"]) <= MEMORY_LIMIT for row in rows),
        "traffic_exact": all(row["traffic_exact"] for row in rows),
    }


def _of_asynchronous(rows: Sequence[Row]) -> Row:
    names = ("step_error", "step_error_at_speed", "step_error_without_versions")
    return {f"median_absolute_{name}": statistics.median(abs(row[name]) for row in rows) for name in names}


# what tells a row of a part from its others, and what the file says of all of them
PARTS: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Row]], Row]]] = {
    "emulated": (("schedule",), _of_emulated),
    "real": (("model", "schedule", "microbatch"), _of_real),
    "asynchronous": (("schedule", "microbatch"), _of_asynchronous),
}


def emulated(schedules: Sequence[str], pairs: int, action_s: float) -> Iterator[Row]:
    """Yield ratios of measured to simulated and to torch's runtime, schedule by schedule."""
    plans = [(name, *(each.model_dump_json() for each in emulated_plan(name, action_s))) for name in schedules]
    for row in _on_ranks((plans, pairs, action_s)):
        yield {**row, "pairs": pairs, "action_s": action_s}


def emulated_plan(name: str, action_s: float) -> tuple[Plan, ModelProfile]:
    """Return a plan whose forwards, input and weight gradients take `action_s` each, and its profile."""
    made = generate(name, ScheduleRequest(NUM_RANKS, NUM_MICROBATCHES))
    cost = ConfigurationCost(
        microbatch=1, sequence_length=8, forward_s=action_s, input_grad_s=action_s, weight_grad_s=action_s,
        activation_bytes=dict.fromkeys(Recompute, 1e3), output_bytes=1024.0, source=Source.MOCKED,
    )  # fmt: skip
    profile = ModelProfile(
        name="sleep",
        layers=tuple(LayerRun(name=f"layer-{index}", layer_class="sleep") for index in range(made.num_stages)),
        classes={"sleep": LayerClass(kind="block", parameters=16, costs=(cost,))},
    )
    chunks = made.num_stages // NUM_RANKS
    plan = Plan(
        model="sleep", profile_digest=profile.digest, layer_digest=profile.layer_digest, num_layers=made.num_stages,
        cluster=_loopback(), job=_job(NUM_MICROBATCHES, 8), planner="benchmark",
        stages=tuple(StagePlan(layers=(stage, stage + 1)) for stage in range(made.num_stages)),
        mapping=RankMapping(pipeline_ranks=tuple((rank,) for rank in range(NUM_RANKS))),
        schedule=ScheduleSpec(
            name=name, num_ranks=NUM_RANKS, num_microbatches=NUM_MICROBATCHES, microbatch=1, num_chunks=chunks,
            placement=tuple(tuple(row) for row in made.placement.tolist()),
        ),
        prediction={
            "step_time_s": 0.0, "tokens_per_s": 0.0, "samples_per_s": 0.0, "bubble_over_total": 0.0,
            "peak_memory_bytes": (), "memory": (), "source": Source.MOCKED,
        },
    )  # fmt: skip
    return with_prediction(plan, profile), profile


def _loopback() -> Cluster:
    """Return four processors joined by this machine's loopback."""
    cluster = resolve_cluster("h100-sxm:4x1")
    group = cluster.groups[0]
    link = group.links[0].model_copy(
        update={"latency_s": 1e-4, "bytes_per_s": 5e9, "segments": (), "collectives": {}, "num_devices": 4}
    )
    device = group.device.model_copy(update={"kind": "cpu"})
    return cluster.model_copy(update={"groups": (group.model_copy(update={"device": device, "links": (link,)}),)})


def _job(global_batch: int, sequence_length: int, optimizer: OptimizerName = "sgd-momentum") -> TrainingJob:
    return TrainingJob(
        global_batch=global_batch, sequence_length=sequence_length, precision="fp32",
        optimizer=Optimizer.standard(optimizer, "fp32"),
    )  # fmt: skip


Emulated = tuple[list[tuple[str, str, str]], int, float]  # (schedule, plan, profile) each, pairs, seconds of an action


def _emulate_all(argument: Emulated) -> Iterator[Row]:
    """Time one schedule after the other, on one rank."""
    plans, pairs, action_s = argument
    for name, plan, profile in plans:
        row = _emulate(Plan.model_validate_json(plan), ModelProfile.model_validate_json(profile), pairs, action_s)
        yield {"schedule": name, **row}
        if dist.get_rank() == 0:
            print(
                f"{name:15s} over simulated {row['over_simulated']:.3f}, over torch {row['over_torch']:.3f} "
                f"({row['over_torch_low']:.3f} to {row['over_torch_high']:.3f})",
                flush=True,
            )


def _emulate(plan: Plan, profile: ModelProfile, pairs: int, action_s: float) -> Row:
    """Time our emulated step and torch's in turn, on one rank."""
    from stagewright.runtime.emulation import EmulatedWorker
    from stagewright.runtime.torch_adapter import default_store
    from stagewright.runtime.torch_pipelining import TorchPipeline

    schedule, evaluation = program_of(plan, profile)
    worker = EmulatedWorker(
        plan,
        profile,
        schedule,
        evaluation,
        store=dist.PrefixStore(plan.schedule.name, default_store()),
        at_action=lambda _: None,
    )
    held = {stage for _, stage in worker.topology.stages}
    theirs = TorchPipeline(
        evaluation.schedule,
        {stage: SleepingStage(action_s) for stage in held},
        lambda output, target: output.sum(),
        torch.device("cpu"),
        weight_gradients={stage: lambda: lambda: _sleep(action_s) for stage in held},
    )
    inputs = torch.zeros(NUM_MICROBATCHES, 256)
    ours_s, theirs_s = [], []
    for pair in range(pairs + 1):
        first = _timed(lambda: worker.run(None, 0))
        second = _timed(lambda: theirs.step(inputs, inputs))
        if pair:  # the first one finds shapes and opens connections
            ours_s.append(first)
            theirs_s.append(second)
    simulated = evaluation.timeline.makespan_s
    ratios = [a / b for a, b in zip(ours_s, theirs_s, strict=True)]
    low, high = _interval(ratios)
    return {
        "simulated_s": simulated,
        "over_simulated": statistics.median(ours_s) / simulated,
        "torch_over_simulated": statistics.median(theirs_s) / simulated,
        "over_torch": statistics.mean(ratios),
        "over_torch_low": low,
        "over_torch_high": high,
        "ratios": ratios,
    }


def _timed(work: Callable[[], object]) -> float:
    """Return the seconds from the first rank's begin to the last one's end."""
    dist.barrier()
    begin = time.monotonic()
    work()
    span = torch.tensor([-begin, time.monotonic()], dtype=torch.float64)
    dist.all_reduce(span, op=dist.ReduceOp.MAX)
    return float(span.sum())


class SleepingStage(nn.Module):
    """A stage that waits in its forward and in its input gradient."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = seconds

    def forward(self, value: Tensor) -> Tensor:
        """Wait and return the value."""
        return _Sleep.apply(value, self.weight, self.seconds)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        if value.device.type != "meta":
            _sleep(seconds)
        return value.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        _sleep(ctx.seconds)
        return gradient.clone(), torch.zeros(1), None


def _sleep(seconds: float) -> None:
    """Wait as the emulation does."""
    end = time.monotonic() + seconds
    time.sleep(seconds)
    while time.monotonic() < end:
        time.sleep(0)


def _interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean."""
    mean = statistics.mean(values)
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return mean - half, mean + half


def _on_ranks(argument: Emulated) -> Iterator[Row]:
    """Yield what rank 0 of a fresh group of ranks finds, as it finds it."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    receiver, sender = context.Pipe(duplex=False)
    ranks = [context.Process(target=_rank, args=(rank, port, argument, sender)) for rank in range(NUM_RANKS)]
    try:
        for process in ranks:
            process.start()
        sender.close()  # so that the pipe ends when the last rank does
        sentinels = {process.sentinel: process for process in ranks}
        while sentinels:
            for ready in multiprocessing.connection.wait([receiver, *sentinels]):
                if ready is not receiver:
                    assert isinstance(ready, int)
                    if sentinels.pop(ready).exitcode:
                        raise RuntimeError("a rank failed")
            with contextlib.suppress(EOFError):
                while receiver.poll():
                    yield receiver.recv()
    finally:
        for process in ranks:
            if process.is_alive():
                process.terminate()


def _rank(rank: int, port: int, argument: Emulated, rows: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=NUM_RANKS)
    for row in _emulate_all(argument):
        if rank == 0:
            rows.send(row)
    dist.destroy_process_group()


def llama(num_layers: int = 6) -> nn.Module:
    """Return a Llama that two processors train."""
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=num_layers, hidden_size=384, intermediate_size=1024, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=2048, max_position_embeddings=256, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _number(values: object, name: str) -> float:
    assert isinstance(values, dict)
    return float(values[name])


def real(
    models: Sequence[str],
    schedules: Sequence[str],
    microbatches: Sequence[int],
    steps: int,
    budget_s: float,
    most_runs: int,
) -> Iterator[Row]:
    """Yield errors of predicted step time and peak memory, and whether traffic was exact, plan by plan.

    A machine's speed drifts over minutes, so runs of a model and profiles of it take turns: each run has a profile right
    before it, which the plan is made with, and one right behind it.
    """
    from stagewright.profiler.discover import discover_local

    cluster = discover_local()

    def planned(profile: ModelProfile, microbatch: int, name: str) -> Plan:
        recompute = Recompute.FULL if microbatch > 1 else Recompute.NONE
        choice = Choice(Degrees(), 2, 2 if name in TWO_CHUNKS else 1, microbatch, name, recompute)
        return with_prediction(even_plan(profile, cluster, _job(8 * microbatch, 128), choice), profile)

    for model, microbatch in product((MODELS[name] for name in models), microbatches):
        before = _profiled(model, microbatch, budget_s)
        for name in schedules:
            tries: list[Row] = []
            while not tries or (_is_disturbed(tries[-1]) and len(tries) < most_runs):
                begin = _Processors.now()
                plan = planned(before, microbatch, name)
                report = _run(model, plan, before, steps, ("memory", "traffic", "time"))
                after = _profiled(model, microbatch, budget_s)
                row = _real_row(model, plan, report, _expected_s(planned(after, microbatch, name), after))
                tries.append({**row, "num_steps": steps, "others_share": _Processors.now().others_since(begin)})
                before = after
            row = {**min(tries, key=_disturbance), "num_tries": len(tries)}
            print(json.dumps(row), flush=True)
            yield row


def asynchronous(schedules: Sequence[str], microbatch: int, steps: int, budget_s: float) -> Iterator[Row]:
    """Yield errors of the step of schedules whose weights change under microbatches, with and without what that takes.

    The example GPT, 8 microbatches a step; each plan is made with a profile right before its run. Without is the expectation
    of the same profile where a copy of the weights takes no time.
    """
    from stagewright.profiler.discover import discover_local

    cluster = discover_local()
    for name in schedules:
        optimizer: OptimizerName = "adam" if name == "xpipe" else "sgd-momentum"
        profile = _profiled(MODELS["gpt"], microbatch, budget_s, optimizer)
        count, parameters = ASYNCHRONOUS[name]
        choice = Choice(Degrees(), 2, 2 if name == "wpipe" else 1, microbatch, name, Recompute.NONE)
        even = even_plan(profile, cluster, _job(count * microbatch, 128, optimizer), choice)
        schedule = even.schedule.model_copy(update={"parameters": parameters})
        plan = with_prediction(even.model_copy(update={"schedule": schedule}), profile)
        report = _run(MODELS["gpt"], plan, profile, steps, ("memory", "time"))
        free = profile.model_copy(update={"copy_bytes_per_s": sys.float_info.max})
        without_s = _expected_s(plan, free)
        median_s = _number(report.measured["step_time_s"], "median")
        row = {
            "schedule": name,
            "parameters": parameters,
            "microbatch": microbatch,
            "step_time_s": report.measured["step_time_s"],
            "step_error": report.error["step_time"],
            "step_error_at_speed": report.error["step_time_at_speed"],
            "step_error_without_versions": without_s / median_s - 1.0,
            "slowness": report.measured["slowness"],
            "peak_error": report.error["peak_memory_max"],
            "copy_bytes_per_s": profile.copy_bytes_per_s,
            "actions": report.checks["time"]["actions"],
        }
        print(json.dumps(row), flush=True)
        yield row


def _profiled(model: str, microbatch: int, budget_s: float, optimizer: OptimizerName = "sgd-momentum") -> ModelProfile:
    from stagewright.profiler.model_profile import profile_model

    return profile_model(
        model, microbatches=(microbatch,), sequence_length=128, num_busy_ranks=2, optimizer=optimizer, budget_s=budget_s
    )


def _run(model: str, plan: Plan, profile: ModelProfile, steps: int, checks: Sequence[str]) -> RunReport:
    from stagewright.runtime.run import run_plan

    with tempfile.TemporaryDirectory() as folder:
        return run_plan(plan, profile, model=model, steps=steps, checks=checks, directory=Path(folder))


def _expected_s(plan: Plan, profile: ModelProfile) -> float:
    from stagewright.planner.expectation import with_expectation

    expectation = with_expectation(evaluate(plan, profile), plan, profile).prediction.expectation
    assert expectation is not None
    return expectation.step_time_s


def _real_row(model: str, plan: Plan, report: RunReport, behind_s: float) -> Row:
    """Return what a run has shown, given the step that the profile behind it predicts."""
    expected_s = _number(report.predicted, "step_time_s")
    median_s = _number(report.measured["step_time_s"], "median")
    return {
        "model": model.rpartition(":")[2],
        "schedule": plan.schedule.name,
        "microbatch": plan.schedule.microbatch,
        "recompute": plan.stages[0].recompute_levels()[0].value,
        "step_time_s": report.measured["step_time_s"],
        "step_error": (expected_s + behind_s) / 2 / median_s - 1.0,
        "step_error_before": report.error["step_time"],
        "step_error_at_speed": report.error["step_time_at_speed"],
        "simulated_step_error_before": _number(report.predicted, "simulated_step_time_s") / median_s - 1.0,
        "message_s": report.predicted["message_s"],
        "jitter_s": report.predicted["jitter_s"],
        "profiles_apart": behind_s / expected_s - 1.0,
        "slowness": report.measured["slowness"],
        "peak_error": report.error["peak_memory_max"],
        "traffic_exact": report.checks["traffic"]["passed"],
    }


def _is_disturbed(row: Row) -> bool:
    return _disturbance(row) > 1.0


def _disturbance(row: Row) -> float:
    """Return how far a run's steps differ and other programs took of the processors, over what is borne of each."""
    unsteadiness = row["step_time_s"]["p80"] / row["step_time_s"]["p20"] - 1.0
    return max(unsteadiness / MOST_UNSTEADINESS, row["others_share"] / MOST_OTHERS)


@dataclass(frozen=True)
class _Processors:
    """Seconds of wall time, of all processors at work, and of this program and those it waited for."""

    wall_s: float
    busy_s: float
    own_s: float

    @classmethod
    def now(cls) -> _Processors:
        user, nice, system, _, _, interrupts, soft_interrupts, *_ = Path("/proc/stat").read_text().split()[1:]
        ticks = sum(map(int, (user, nice, system, interrupts, soft_interrupts)))
        return cls(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]))

    def others_since(self, begin: _Processors) -> float:
        """Return the share of the processors that other programs took."""
        busy, own = self.busy_s - begin.busy_s, self.own_s - begin.own_s
        return max(busy - own, 0.0) / ((self.wall_s - begin.wall_s) * (os.cpu_count() or 1))


if __name__ == "__main__":
    sys.exit(main())
