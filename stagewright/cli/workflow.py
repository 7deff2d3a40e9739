"""Profile, plan and run: what `demo` and `run MODEL` do, and the table they end with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stagewright.cli.output import ReportsProgress, bytes_text, console, seconds_text
from stagewright.planner.documents import Cluster, ModelProfile, Optimizer, Plan, SearchSpace, TrainingJob
from stagewright.planner.documents.document import write_text
from stagewright.planner.documents.profile import Recompute
from stagewright.planner.errors import Infeasible, InvalidDocument, NoIncumbent

if TYPE_CHECKING:
    from stagewright.runtime.report import RunReport

NOTEWORTHY_ERROR = 0.10


@dataclass(frozen=True)
class Workload:
    """What to train: the model's and the data's factories and the sizes of one step."""

    model: str
    data: str | None = None
    global_batch: int = 16
    sequence_length: int = 128
    microbatches: tuple[int, ...] = (1, 2, 4)


def local_cluster(path: Path, report: ReportsProgress, *, refresh: bool) -> Cluster:
    """Return this machine as a cluster: the one in `path` when it still describes the machine, else measured anew."""
    from stagewright.profiler.discover import describe_local, discover_local

    if path.exists() and not refresh:
        try:
            known = Cluster.load(path)
        except InvalidDocument:
            known = None
        if known is not None:
            described = (known.groups[0].device.name, known.num_devices)
            if described == describe_local():
                report("cluster (kept)", 1, 1)
                return known
    cluster = discover_local(progress=report)
    cluster.save(path)
    return cluster


def measured_profile(
    workload: Workload, cluster: Cluster, out: Path, report: ReportsProgress, *, refresh: bool
) -> ModelProfile:
    """Return the model's profile, measured under as many busy ranks as the cluster has; known layers are not measured again."""
    from stagewright.profiler.model_profile import profile_model

    profile = profile_model(
        workload.model,
        data=workload.data,
        microbatches=workload.microbatches,
        sequence_length=workload.sequence_length,
        num_busy_ranks=cluster.num_devices,
        optimizer="sgd-momentum",
        cache=out / "cache",
        refresh=refresh,
        progress=report,
    )
    profile.save(out / "profile.json")
    return profile


def training_job(workload: Workload) -> TrainingJob:
    """Return the job of a local run: fp32, SGD with momentum, every schedule the runtime executes."""
    return TrainingJob(
        global_batch=workload.global_batch,
        sequence_length=workload.sequence_length,
        precision="fp32",
        optimizer=Optimizer.standard("sgd-momentum", "fp32"),
        space=SearchSpace(zero=(0,), recompute=(Recompute.NONE, Recompute.FULL), max_chunks=2),
    )


def best_plan(profile: ModelProfile, cluster: Cluster, job: TrainingJob, report: ReportsProgress) -> Plan:
    """Return the best plan; raises Infeasible or NoIncumbent when there is none."""
    from stagewright.planner.planning import make_plan

    outcome = make_plan(
        profile, cluster, job, progress=lambda state: report(f"plan: {state.phase}", state.done, state.total)
    )
    if outcome.plan is None:
        if outcome.diagnosis is not None:
            raise Infeasible(outcome.diagnosis.message, hint="use a smaller model, batch or sequence")
        raise NoIncumbent("no plan was found before the limit")
    return outcome.plan


def save_run(out: Path, plan: Plan, report: RunReport) -> None:
    """Write run.json, timeline.html and trace.json (of the measured step, for Perfetto) into `out`."""
    from stagewright.formats.chrome_trace import chrome_trace
    from stagewright.formats.timeline_html import timeline_html

    write_text(out / "run.json", json.dumps(report.to_json(), indent=1) + "\n")
    memory = plan.cluster.groups[0].device.memory_bytes
    measured = report.measured["peak_memory_bytes"]
    assert isinstance(measured, list)
    peak = max([float(value) for value in measured if value is not None], default=0.0)
    page = timeline_html(
        [("predicted", report.predicted_timeline), ("measured", report.timeline)],
        title=f"{plan.model}: predicted above measured",
        facts={
            "plan": f"{plan.schedule.name}, {plan.schedule.num_ranks} pipeline ranks x "
            f"{plan.num_devices // plan.schedule.num_ranks} replicas, {plan.schedule.num_microbatches} microbatches of "
            f"{plan.schedule.microbatch}",
            "cluster": f"{plan.num_devices} x {plan.cluster.groups[0].device.name}",
            "step time": f"predicted {seconds_text(float(str(report.predicted['step_time_s'])))}, measured {_measured_step(report)}",
        },
        memory_limit_bytes=memory if memory < 4 * peak else None,
    )
    write_text(out / "timeline.html", page)
    write_text(out / "trace.json", json.dumps(chrome_trace(report.timeline, name=plan.model)) + "\n")


def print_report(report: RunReport) -> None:
    """Print predicted against measured as one table, the checks, and where a large error comes from."""
    from rich.table import Table

    screen = console()
    table = Table("", "predicted", "measured", "error", box=None)
    error = report.error["step_time"]
    predicted_s = float(str(report.predicted["step_time_s"]))
    table.add_row(
        "step time", seconds_text(predicted_s), _measured_step(report), "" if error is None else f"{error:+.1%}"
    )
    at_speed = report.error.get("step_time_at_speed")
    if at_speed is not None:
        slowness = report.measured["slowness"]
        assert isinstance(slowness, dict)
        table.add_row(
            f"at {1 / slowness['median']:.2f} of the profile's speed",
            seconds_text(float(str(report.predicted["step_time_at_speed_s"]))),
            _measured_step(report),
            f"{at_speed:+.1%}",
        )
    predicted = _floats(report.predicted["peak_memory_bytes"])
    measured = report.measured["peak_memory_bytes"]
    assert isinstance(measured, list)
    for rank, (expected, found) in enumerate(zip(predicted, measured, strict=True) if measured else ()):
        if found is None:  # a rank that was not replayed
            continue
        relative = f"{expected / found - 1:+.1%}" if found else ""
        table.add_row(f"peak memory, rank {rank}", bytes_text(expected), bytes_text(found), relative)
    screen.print(table)
    gradients = report.checks.get("gradients")
    if gradients is not None:
        verdict = "agree" if gradients["passed"] else "[red]DIFFER[/red]"
        screen.print(
            f"gradients {verdict} with one process: {gradients['max_relative_error']:.1e}, "
            f"weights after training steps {gradients['weights_max_relative_error']:.1e} (limit {gradients['limit']:.0e})"
        )
    traffic = report.checks.get("traffic")
    if traffic is not None:
        screen.print(f"bytes sent {'equal' if traffic['passed'] else '[red]differ from[/red]'} the prediction")
    if error is not None and abs(error) > NOTEWORTHY_ERROR:
        for line in error_sources(report):
            screen.print(line)


def error_sources(report: RunReport) -> list[str]:
    """Return the actions that differ most from their prediction, one line each, longest difference first."""
    check = report.checks.get("time")
    if check is None:
        return []
    actions = check["actions"]
    assert isinstance(actions, dict)
    rows = [(float(v["measured_s"]) - float(v["predicted_s"]), name, v) for name, v in actions.items()]
    rows.sort(key=lambda row: -abs(row[0]))
    lines = ["the step differs by more than 10 %; the actions that differ most:"]
    for difference, name, value in rows[:4]:
        lines.append(
            f"  {name}: predicted {seconds_text(value['predicted_s'])}, measured {seconds_text(value['measured_s'])} "
            f"({difference * 1e3:+.2f} ms each)"
        )
    return lines


def _measured_step(report: RunReport) -> str:
    step = report.measured["step_time_s"]
    assert isinstance(step, dict)
    if step["median"] is None:
        return "not measured"
    return f"{seconds_text(step['median'])} ({seconds_text(step['p20'])} to {seconds_text(step['p80'])})"


def _floats(values: object) -> Sequence[float]:
    assert isinstance(values, list | tuple)
    return [float(value) for value in values]
