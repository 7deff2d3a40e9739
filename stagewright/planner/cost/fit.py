"""Fits efficiencies to measured runs, and says how well it would have predicted runs it has not seen.

Unknowns x (a factor on each efficiency, 1 is "as it was") minimise over runs k with predicted p_k(x), measured m_k

    sum_k (log p_k(x) - log m_k)^2 / s^2  +  sum_i (log x_i / t_i)^2,      x_i within bounds

by scipy's bounded least squares (trust region reflective; Branch, Coleman and Li 1999). Logarithms make 10 % too fast and 10 %
too slow weigh the same; the second sum is a prior of spread t_i that keeps what few runs cannot tell apart near where it
was. In-sample error is that of the fit itself; cross-validated error predicts each run by a fit to all the others (or each
group of runs by a fit to the other groups), so it does not shrink by adding unknowns. A fit is local: another start may
end elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from stagewright.planner.documents.cluster import Cluster, Device, EfficiencyPoint, LinkLevel, NodeGroup
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ConfigurationCost, LayerClass, ModelProfile, Source
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.prediction import evaluate

Floats = npt.NDArray[np.float64]

RELATIVE_SPREAD = 0.03
LARGEST_SHARE = 1.5


@dataclass(frozen=True)
class Unknown:
    """One factor to fit: its bounds, and the spread of its prior in logarithms."""

    name: str
    lower: float = 0.25
    upper: float = 4.0
    spread: float = 0.3


@dataclass(frozen=True)
class MeasuredRun:
    """A plan that ran, the profile it was priced with, and the seconds of its step.

    `group` names runs that belong together when others are held out (one paper, one machine); each run alone when empty.
    """

    name: str
    plan: Plan
    profile: ModelProfile
    step_s: float
    group: str = ""


@dataclass(frozen=True)
class FittedRun:
    """One run after the fit: what the model said before, says now, and says when this run was held out."""

    name: str
    measured_s: float
    before_s: float
    fitted_s: float
    held_out_s: float


@dataclass(frozen=True)
class Fit:
    """What a fit found; errors are mean and worst relative errors."""

    factors: Mapping[str, float]
    runs: tuple[FittedRun, ...]

    def error(self, which: str) -> tuple[float, float]:
        """Return (mean, worst) of "before", "fitted" (in sample) or "held_out" (cross-validated)."""
        errors = [abs(getattr(run, f"{which}_s") / run.measured_s - 1.0) for run in self.runs]
        return float(np.mean(errors)), max(errors)

    def to_json(self) -> dict[str, object]:
        """Return the document of `cost fit --json`."""
        summary = {
            name: dict(zip(("mean", "worst"), self.error(which), strict=True))
            for name, which in (("before", "before"), ("in_sample", "fitted"), ("cross_validated", "held_out"))
        }
        rows = [
            {
                "name": run.name,
                "measured_s": run.measured_s,
                "before_s": run.before_s,
                "fitted_s": run.fitted_s,
                "held_out_s": run.held_out_s,
            }
            for run in self.runs
        ]
        return {"factors": dict(self.factors), "error": summary, "runs": rows}


Predict = Callable[[Mapping[str, float]], Sequence[float]]


def fit_factors(
    predict: Predict, measured: Sequence[float], unknowns: Sequence[Unknown], *, spread: float = RELATIVE_SPREAD
) -> dict[str, float]:
    """Return the factors for which `predict` comes nearest to `measured`.

    Raises InvalidArgument for no runs, or a measured time that is not above 0.
    """
    _check(measured, unknowns)
    target = np.log(np.asarray(measured, dtype=np.float64))
    spreads = np.array([unknown.spread for unknown in unknowns])

    def residuals(logs: Floats) -> Floats:
        factors = {unknown.name: float(np.exp(value)) for unknown, value in zip(unknowns, logs, strict=True)}
        predicted = np.log(np.asarray(predict(factors), dtype=np.float64))
        return np.concatenate(((predicted - target) / spread, logs / spreads))

    found = least_squares(
        residuals,
        np.zeros(len(unknowns)),
        bounds=([np.log(unknown.lower) for unknown in unknowns], [np.log(unknown.upper) for unknown in unknowns]),
        diff_step=1e-3,
        x_scale=spreads,
        max_nfev=60,
    )
    return {unknown.name: float(np.exp(value)) for unknown, value in zip(unknowns, found.x, strict=True)}


def fit_runs(runs: Sequence[MeasuredRun], unknowns: Sequence[Unknown] | None = None) -> Fit:
    """Return the factors on the runs' efficiencies, with in-sample and cross-validated errors."""
    chosen = list(unknowns) if unknowns is not None else default_unknowns(runs)
    _check([run.step_s for run in runs], chosen)

    def predictor(subset: Sequence[MeasuredRun]) -> Predict:
        return lambda factors: [predict_run(run, factors) for run in subset]

    measured = [run.step_s for run in runs]
    factors = fit_factors(predictor(runs), measured, chosen)
    groups = [run.group or f"run {index}" for index, run in enumerate(runs)]
    held_out = {group: _held_out_factors(runs, groups, group, predictor, chosen) for group in dict.fromkeys(groups)}
    fitted = tuple(
        FittedRun(
            run.name,
            run.step_s,
            predict_run(run, {}),
            predict_run(run, factors),
            predict_run(run, held_out[group]),
        )
        for run, group in zip(runs, groups, strict=True)
    )
    return Fit(factors, fitted)


def default_unknowns(runs: Sequence[MeasuredRun]) -> list[Unknown]:
    """Return what the runs can tell: efficiencies of analytic profiles, the speed of measured ones, links, overhead."""
    analytic = any(layer.operators and not layer.costs for run in runs for layer in run.profile.classes.values())
    measured = any(layer.costs for run in runs for layer in run.profile.classes.values())
    names = sorted({level.name for run in runs for group in run.plan.cluster.groups for level in group.links})
    found = []
    if analytic:
        found += [Unknown("matmul"), Unknown("memory", spread=0.2), Unknown("launch", spread=0.5)]
    if measured:
        found.append(Unknown("layers"))
    return found + [Unknown(f"link:{name}", spread=0.2) for name in names]


def predict_run(run: MeasuredRun, factors: Mapping[str, float]) -> float:
    """Return the step seconds of a run under some factors."""
    plan = run.plan.model_copy(update={"cluster": adjusted_cluster(run.plan.cluster, factors)})
    return evaluate(plan, adjusted_profile(run.profile, factors)).prediction.step_time_s


def adjusted_cluster(cluster: Cluster, factors: Mapping[str, float]) -> Cluster:
    """Return the cluster with its efficiencies multiplied by the factors `matmul`, `attention`, `memory`, `launch` and
    `link:NAME`; shares stay within what a document allows."""
    groups = tuple(
        group.model_copy(
            update={
                "device": _adjusted_device(group.device, factors),
                "links": tuple(_adjusted_link(level, factors) for level in group.links),
            }
        )
        for group in cluster.groups
    )
    between = cluster.between_groups
    return cluster.model_copy(
        update={"groups": groups, "between_groups": _adjusted_link(between, factors) if between else None}
    )


def fitted_cluster(cluster: Cluster, factors: Mapping[str, float]) -> Cluster:
    """Return the adjusted cluster with its devices and links marked as fitted."""
    adjusted = adjusted_cluster(cluster, factors)

    def marked(group: NodeGroup) -> NodeGroup:
        device = group.device.model_copy(update={"source": Source.FITTED})
        links = tuple(level.model_copy(update={"source": Source.FITTED}) for level in group.links)
        return group.model_copy(update={"device": device, "links": links})

    return adjusted.model_copy(update={"groups": tuple(marked(group) for group in adjusted.groups)})


def adjusted_profile(profile: ModelProfile, factors: Mapping[str, float]) -> ModelProfile:
    """Return the profile with its measured seconds divided by the factor `layers`, a speed."""
    speed = factors.get("layers", 1.0)
    if speed == 1.0 or not any(layer.costs for layer in profile.classes.values()):
        return profile

    def slower(cost: ConfigurationCost) -> ConfigurationCost:
        return cost.model_copy(
            update={
                "forward_s": cost.forward_s / speed,
                "input_grad_s": cost.input_grad_s / speed,
                "weight_grad_s": cost.weight_grad_s / speed,
                "split_excess_s": cost.split_excess_s / speed,
                "optimizer_s": cost.optimizer_s / speed,
                "recompute_s": {level: seconds / speed for level, seconds in cost.recompute_s.items()},
            }
        )

    def layer(value: LayerClass) -> LayerClass:
        return value.model_copy(update={"costs": tuple(slower(cost) for cost in value.costs)})

    copy_bytes_per_s = None if profile.copy_bytes_per_s is None else profile.copy_bytes_per_s * speed
    classes = {name: layer(value) for name, value in profile.classes.items()}
    return profile.model_copy(update={"classes": classes, "copy_bytes_per_s": copy_bytes_per_s})


def _held_out_factors(
    runs: Sequence[MeasuredRun],
    groups: Sequence[str],
    held_out: str,
    predictor: Callable[[Sequence[MeasuredRun]], Predict],
    unknowns: Sequence[Unknown],
) -> dict[str, float]:
    rest = [run for run, group in zip(runs, groups, strict=True) if group != held_out]
    if not rest:
        return {}
    return fit_factors(predictor(rest), [run.step_s for run in rest], unknowns)


def _adjusted_device(device: Device, factors: Mapping[str, float]) -> Device:
    matmul, memory = factors.get("matmul", 1.0), factors.get("memory", 1.0)
    attention = factors.get("attention", matmul)
    return device.model_copy(
        update={
            "matmul_efficiency": _scaled(device.matmul_efficiency, matmul),
            "attention_efficiency": _scaled(device.attention_efficiency, attention),
            "memory_efficiency": _scaled(device.memory_efficiency, memory),
            "launch_s": device.launch_s * factors.get("launch", 1.0),
        }
    )


def _scaled(points: tuple[EfficiencyPoint, ...], factor: float) -> tuple[EfficiencyPoint, ...]:
    return tuple(EfficiencyPoint(size=point.size, share=min(LARGEST_SHARE, point.share * factor)) for point in points)


def _adjusted_link(level: LinkLevel, factors: Mapping[str, float]) -> LinkLevel:
    factor = factors.get(f"link:{level.name}", 1.0)
    return level.model_copy(update={"achieved_share": min(1.0, level.achieved_share * factor)})


def _check(measured: Sequence[float], unknowns: Sequence[Unknown]) -> None:
    if not measured:
        raise InvalidArgument("there are no measured runs to fit", field="runs", hint="give at least one run")
    for index, value in enumerate(measured):
        if not (np.isfinite(value) and value > 0):
            raise InvalidArgument(
                f"runs[{index}] took {value} seconds, it must be above 0", field=f"runs[{index}].step_time_s"
            )
    if not unknowns:
        raise InvalidArgument(
            "nothing was named to fit", field="unknowns", hint="for example matmul, memory, link:nvlink"
        )
