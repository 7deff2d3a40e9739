"""The report of a run: predicted against measured, and what the checks found. The keys of run.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from stagewright.planner.documents.plan import Plan, Prediction
from stagewright.planner.link_bytes import LENT
from stagewright.planner.prediction import Evaluation, Floats, step_time_at
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.simulation.timeline import Timeline
from stagewright.runtime.measurement import Measurement
from stagewright.runtime.replay import ComposedStep
from stagewright.runtime.stillness import draws_as_one_process

GRADIENT_LIMITS: Mapping[str, float] = {"fp64": 1e-10, "fp32": 1e-5, "bf16": 5e-2, "fp16": 5e-3, "fp8": 2e-1}
MEMORY_LIMIT = 0.03
ROUTED = (
    "all-to-all/ep",
    "all-gather/etp",
    "reduce-scatter/etp",
)  # bytes that depend on which experts the tokens choose
RING = "/cp"  # how the traffic of divided sequences ends
NO_OPERATORS = (
    "the profile has no operators, from which what the parts of a sequence exchange and hold for it is predicted"
)
DISTURBED = 0.08  # change of a rank's speed within a run that is worth telling
TRAFFIC_LIMIT, LENT_LIMIT = 1e-9, 0.03  # what is lent are activations, as close as the prediction of memory


@dataclass(frozen=True)
class RunReport:
    """What `stagewright run` answers.

    Parameters
    ----------
    predicted, measured, error : step time and peak memory of each global rank, and their relative errors; `step_time_s` is the
        expected one, with `simulated_step_time_s` and what messages and jitter add to it beside it; where profile and run hold speed probes, also the step time predicted for the speed of the run, and its error, step by step.
    checks : by name; each has `passed` and its numbers.
    timeline : the step with the median time; predicted_timeline : the simulated one, of pipeline ranks.
    first_step : number of the step that the first loss belongs to.
    restarts : of each lost rank, its message, and from which step how many devices went on.
    replayed : of each replayed rank, seconds by action and peak memory, predicted against measured; None for a run.
    """

    predicted: dict[str, object]
    measured: dict[str, object]
    error: dict[str, float | None]
    checks: dict[str, dict[str, object]]
    losses: tuple[float, ...]
    timeline: Timeline
    predicted_timeline: Timeline
    versions: dict[str, str] = field(default_factory=dict)
    first_step: int = 0
    replayed: list[dict[str, object]] | None = None
    restarts: list[dict[str, object]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the run computed and sent what it had to; how near memory came speaks of the prediction, not of it."""
        return all(bool(check.get("passed", True)) for name, check in self.checks.items() if name != "memory")

    def to_json(self) -> dict[str, object]:
        """Return the document of `run --json`."""
        return {
            "predicted": self.predicted,
            "measured": self.measured,
            "error": self.error,
            "checks": self.checks,
            "losses": list(self.losses),
            "first_step": self.first_step,
            "versions": self.versions,
            **({} if self.replayed is None else {"replayed": self.replayed}),
            **({"restarts": self.restarts} if self.restarts else {}),
        }


def make_report(
    plan: Plan,
    evaluation: Evaluation,
    measurement: Measurement,
    checks: Sequence[str],
    *,
    probe_s: float = 0.0,
    peak_bytes: Sequence[float] | None = None,
) -> RunReport:
    """Return the report of a measurement.

    `probe_s` is what the speed probe took when the profile was made (`Pedigree.probe_s`): with it, and the run's own
    probes, each step is compared with the prediction for the speed that the ranks had around it, too. `peak_bytes` are the
    predicted peaks by global rank where the devices of one pipeline rank differ.
    """
    prediction, simulated = evaluation.prediction, evaluation.timeline
    slowness = _slowness(plan, measurement, probe_s)
    times = sorted(measurement.step_times_s)
    median = statistics.median(times) if times else None
    predicted_memory = _by_device(plan, _expected_peaks(prediction)) if peak_bytes is None else list(peak_bytes)
    held = _by_device(plan, [item.framework for item in prediction.memory])
    measured_memory = [a + b for a, b in zip(measurement.peak_memory_bytes, held, strict=False)]
    timeline = measurement.timeline(plan.num_devices)
    expected_s = _expected_step(prediction)["step_time_s"]
    step_error = None if median is None else expected_s / median - 1.0
    memory_errors = [p / m - 1.0 for p, m in zip(predicted_memory, measured_memory, strict=False) if m > 0]
    memory_error = max(memory_errors, key=abs, default=None)
    found: dict[str, dict[str, object]] = {}
    if "gradients" in checks and measurement.gradients and measurement.weights:
        found["gradients"] = _gradients(plan, measurement)
    if "memory" in checks:
        host = _host_bytes(plan, evaluation, measurement)
        found["memory"] = {
            "max_relative_error": memory_error,
            "limit": MEMORY_LIMIT,
            "passed": memory_error is not None
            and abs(memory_error) <= MEMORY_LIMIT
            and all(math.isclose(p, m, rel_tol=MEMORY_LIMIT) for p, m in zip(*host.values(), strict=True)),
            "items": measurement.static_memory_bytes,
            **({"reason": NO_OPERATORS} if _lacks_operators(plan, prediction) else {}),
            **({"host_bytes": host} if any(host["predicted"]) else {}),
        }
    if "traffic" in checks:
        found["traffic"] = _traffic(prediction.link_bytes, measurement.sent_bytes)
    if "time" in checks:
        found["time"] = _time(plan, simulated, timeline)
    at_speed = [step_time_at(evaluation, row) for row in slowness]
    return RunReport(
        predicted={
            **_expected_step(prediction),
            **({"step_time_at_speed_s": statistics.median(at_speed)} if at_speed else {}),
            "peak_memory_bytes": predicted_memory,
        },
        measured={
            "step_time_s": {"median": median, "p20": _quantile(times, 0.2), "p80": _quantile(times, 0.8)},
            **({"slowness": _slowness_numbers(slowness, measurement.stolen_share)} if at_speed else {}),
            "peak_memory_bytes": measured_memory,
        },
        error={
            "step_time": step_error,
            **({"step_time_at_speed": _median_error(at_speed, measurement.step_times_s)} if at_speed else {}),
            "peak_memory_max": memory_error,
        },
        checks=found,
        losses=tuple(measurement.losses),
        timeline=timeline,
        predicted_timeline=simulated,
        versions=measurement.versions,
        first_step=measurement.first_step,
    )


def _host_bytes(plan: Plan, evaluation: Evaluation, measurement: Measurement) -> dict[str, list[float]]:
    """Return the optimizer states in host memory by global rank, predicted and measured."""
    measured = [item.get("host", 0.0) for item in measurement.static_memory_bytes]
    return {
        "predicted": _by_device(plan, evaluation.host_bytes.tolist()) if measured else [],
        "measured": measured,
    }


def _expected_step(prediction: Prediction) -> dict[str, float]:
    """Return the step time that a run should take, and what it was made of where that is more than the simulation."""
    expected = prediction.expectation
    if expected is None:
        return {"step_time_s": prediction.step_time_s}
    return {
        "step_time_s": expected.step_time_s,
        "simulated_step_time_s": prediction.step_time_s,
        "message_s": expected.message_s,
        "jitter_s": expected.jitter_s,
    }


def _expected_peaks(prediction: Prediction) -> tuple[float, ...]:
    expected = prediction.expectation
    return prediction.peak_memory_bytes if expected is None else expected.peak_memory_bytes


def _slowness(plan: Plan, measurement: Measurement, probe_s: float) -> list[Floats]:
    """Return of each timed step how many times as long as at profiling a computation takes on each pipeline rank, [D].

    That is what a probe took, and what the host took of the step.
    """
    if probe_s <= 0:
        return []
    ranks = plan.mapping.pipeline_ranks
    return [
        np.array([max(row[rank] for rank in devices) for devices in ranks]) / probe_s / (1.0 - min(stolen, 0.5))
        for row, stolen in zip(measurement.probe_s, measurement.stolen_share, strict=True)
    ]


def _slowness_numbers(slowness: Sequence[Floats], stolen_share: Sequence[float]) -> dict[str, float]:
    """Return the mean over the ranks by the median step and the 20th and 80th percentile, and how many steps were disturbed.

    A step is disturbed when a rank's probe differs from that rank's median of the run by more than `DISTURBED`.
    """
    rows = np.array(slowness)
    middle = np.median(rows, axis=0)
    low, median, high = np.quantile(rows.mean(axis=1), [0.2, 0.5, 0.8]).tolist()
    disturbed = (np.abs(rows / middle - 1.0) > DISTURBED).any(axis=1)
    return {
        "median": median,
        "p20": low,
        "p80": high,
        "num_disturbed_steps": int(disturbed.sum()),
        "stolen_share": statistics.fmean(stolen_share),
    }


def _median_error(predicted_s: Sequence[float], measured_s: Sequence[float]) -> float:
    return statistics.median(p / m - 1.0 for p, m in zip(predicted_s, measured_s, strict=True))


def make_replay_report(plan: Plan, evaluation: Evaluation, composed: ComposedStep) -> RunReport:
    """Return the report of a replay: the composed step in place of a measured one."""
    predicted_memory = _by_device(plan, _expected_peaks(evaluation.prediction))
    pairs = zip(predicted_memory, composed.peak_memory_bytes, strict=True)
    memory_errors = [predicted / measured - 1.0 for predicted, measured in pairs if measured]
    step_s = composed.step_time_s
    return RunReport(
        predicted={"step_time_s": evaluation.prediction.step_time_s, "peak_memory_bytes": predicted_memory},
        measured={
            "step_time_s": {"median": step_s, "p20": step_s, "p80": step_s},
            "peak_memory_bytes": composed.peak_memory_bytes,
        },
        error={
            "step_time": evaluation.prediction.step_time_s / step_s - 1.0,
            "peak_memory_max": max(memory_errors, key=abs, default=None),
        },
        checks={},
        losses=(),
        timeline=composed.timeline,
        predicted_timeline=evaluation.timeline,
        replayed=composed.rows,
    )


def _by_device(plan: Plan, values: Sequence[float]) -> list[float]:
    """Return a value of each pipeline rank for each of its devices, by global rank."""
    result = [0.0] * plan.num_devices
    for ranks, value in zip(plan.mapping.pipeline_ranks, values, strict=True):
        for rank in ranks:
            result[rank] = value
    return result


def _gradients(plan: Plan, measurement: Measurement) -> dict[str, object]:
    assert measurement.gradients is not None and measurement.weights is not None
    limit = GRADIENT_LIMITS[str(plan.schedule.parameters.get("autocast", plan.job.precision))]
    error, weights = measurement.gradients[0], measurement.weights[0]
    return {
        "max_relative_error": error,
        "parameter": measurement.gradients[1],
        "weights_max_relative_error": weights,
        "weights_parameter": measurement.weights[1],
        "limit": limit,
        **({} if draws_as_one_process(plan) else {"dropout": "off"}),
        "passed": error <= limit and weights <= limit,
    }


def _lacks_operators(plan: Plan, prediction: Prediction) -> bool:
    """Whether sequences are divided and nothing that their parts exchange is predicted."""
    is_divided = any(stage.degrees.cp > 1 for stage in plan.stages)
    return is_divided and not any(name.endswith(RING) for name in prediction.link_bytes)


def _traffic(predicted: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, object]:
    sent = {name: value for name, value in measured.items() if value}
    errors = {
        name: predicted.get(name, 0.0) / sent[name] - 1.0 if sent.get(name) else float(predicted.get(name, 0.0) > 0)
        for name in sorted({*predicted, *sent})
    }
    unknown = [] if any(name.endswith(RING) for name in predicted) else [name for name in sent if name.endswith(RING)]
    return {
        "predicted_bytes": dict(predicted),
        "measured_bytes": sent,
        "relative_error": errors,
        "depends_on_data": [name for name in errors if name in ROUTED],
        **({"not_predicted": unknown, "reason": NO_OPERATORS} if unknown else {}),
        "passed": all(
            abs(value) <= (LENT_LIMIT if name == LENT else TRAFFIC_LIMIT)
            for name, value in errors.items()
            if name not in ROUTED and name not in unknown
        ),
    }


def _time(plan: Plan, simulated: Timeline, measured: Timeline) -> dict[str, object]:
    """Compare spans of compute, action by action, over the first device of each pipeline rank.

    `critical_path` compares the seconds of the actions on the simulated longest path. The simulation has one optimizer step
    for all stages of a rank, so where it does, those of its stages are added up.
    """
    first = {ranks[0]: index for index, ranks in enumerate(plan.mapping.pipeline_ranks)}
    expected = {
        (int(rank), *row[:5]): end - start
        for rank, row, start, end in zip(
            simulated.rank, simulated.action.tolist(), simulated.start_s, simulated.end_s, strict=True
        )
    }
    path = {
        (int(simulated.rank[span]), *simulated.action[span, :5].tolist()) for span in simulated.critical_path.tolist()
    }
    steps: dict[int, list[tuple[int, ...]]] = {}  # optimizer steps by rank
    for key in expected:
        if key[1] == Kind.OPT:
            steps.setdefault(key[0], []).append(key)
    taken: dict[tuple[int, ...], float] = {}
    for rank, lane, row, start, end in zip(
        measured.rank, measured.lane, measured.action.tolist(), measured.start_s, measured.end_s, strict=True
    ):
        key = (first.get(int(rank), -1), *row[:5])
        if lane == 0:
            if row[0] == Kind.OPT and len(steps.get(key[0], ())) == 1:
                key = steps[key[0]][0]
            taken[key] = taken.get(key, 0.0) + float(end - start)
    by_action: dict[str, list[tuple[float, float]]] = {}
    along_path: list[tuple[float, float]] = []
    for key in taken.keys() & expected.keys():
        pair = (float(expected[key]), taken[key])
        by_action.setdefault(str(Action(Kind(key[1]), key[3])), []).append(pair)
        if key in path:
            along_path.append(pair)
    actions = {
        name: {
            "predicted_s": float(np.median([p for p, _ in pairs])),
            "measured_s": float(np.median([m for _, m in pairs])),
        }
        for name, pairs in sorted(by_action.items())
    }
    return {
        "actions": actions,
        "bubble_over_total": {
            "predicted": simulated.bubble_over_total if len(simulated.end_s) else None,
            "measured": measured.bubble_over_total if len(measured.end_s) else None,
        },
        "makespan_s": {"predicted": simulated.makespan_s, "measured": measured.makespan_s},
        "critical_path": {
            "actions": len(along_path),
            "predicted_s": math.fsum(predicted for predicted, _ in along_path),
            "measured_s": math.fsum(seconds for _, seconds in along_path),
        },
    }


def _quantile(values: Sequence[float], share: float) -> float | None:
    return float(np.quantile(values, share)) if values else None
