"""Folding a run's measured actions back into the profile it was planned from.

A run tells, for each stage s and direction (forward, backward), the measured seconds m_s of one action against the
predicted p_s. The profile's classes c contribute a_sc seconds to the prediction, sum_c a_sc = p_s less what is no layer.
Looked for are factors x_c near 1:

    minimise  sum_s (sum_c a_sc x_c - m_s)^2 + ridge * sum_c (a_c (x_c - 1))^2,   a_c = sum_s a_sc

a linear least-squares problem with one unknown for each class and direction. The ridge is small: it decides what one stage
alone cannot tell, namely how its surplus divides among its classes (in proportion to their squared shares). Entries that
were scaled are marked `fitted`.

Not guaranteed: that a factor holds in configurations the run did not use; all of a class's are scaled alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents import ConfigurationCost, LayerClass, ModelProfile, Plan, Recompute, Source
from stagewright.planner.errors import InvalidDocument

Floats = npt.NDArray[np.float64]

_RIDGE = 1e-2
_LIMITS = (0.2, 5.0)


@dataclass(frozen=True)
class Calibration:
    """The calibrated profile, the factors by class, and the error of actions before and after (mean of |p / m - 1|)."""

    profile: ModelProfile
    forward_factors: Mapping[str, float]
    backward_factors: Mapping[str, float]
    error_before: float
    error_after: float


@dataclass(frozen=True)
class _Row:
    shares: Mapping[str, float]
    rest_s: float
    measured_s: float


def calibrate(profile: ModelProfile, plan: Plan, run: object) -> Calibration:
    """Return the profile with its times scaled to what a run of `plan` measured.

    Parameters
    ----------
    run : the parsed run.json; its `checks.time.actions` are used.

    Raises
    ------
    InvalidDocument : when the plan is for other layers, or the run holds no measured actions.
    """
    plan.check_profile(layer_digest=profile.layer_digest, num_layers=profile.num_layers)
    actions = _actions(run)
    forward = _rows(profile, plan, actions, "F")
    backward = _rows(profile, plan, actions, "B")
    if not forward and not backward:
        raise InvalidDocument(
            "the run holds no measured forward or backward",
            field="checks.time.actions",
            hint="run with --check time",
        )
    names = sorted(profile.classes)
    factors = {"F": _factors(forward, names), "B": _factors(backward, names)}
    both = [*((row, factors["F"]) for row in forward), *((row, factors["B"]) for row in backward)]
    classes = {name: _scaled(value, factors["F"][name], factors["B"][name]) for name, value in profile.classes.items()}
    warning = f"times were calibrated to a run of plan {plan.digest[:19]}"
    pedigree = profile.pedigree.model_copy(update={"warnings": (*profile.pedigree.warnings, warning)})
    return Calibration(
        profile=profile.model_copy(update={"classes": classes, "pedigree": pedigree}),
        forward_factors=factors["F"],
        backward_factors=factors["B"],
        error_before=_mean_error([(row, dict.fromkeys(names, 1.0)) for row, _ in both]),
        error_after=_mean_error(both),
    )


def _actions(run: object) -> Mapping[str, Mapping[str, float]]:
    value: object = run
    for key in ("checks", "time", "actions"):
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not value:
        raise InvalidDocument(
            "the run holds no measured actions", field="checks.time.actions", hint="run with --check time"
        )
    return value


def _rows(profile: ModelProfile, plan: Plan, actions: Mapping[str, Mapping[str, float]], kind: str) -> list[_Row]:
    rows = []
    for index, stage in enumerate(plan.stages):
        measured = _seconds(actions, f"{index}{kind}")
        if measured is None and kind == "B":
            parts = [_seconds(actions, f"{index}I"), _seconds(actions, f"{index}W")]
            measured = None if None in parts else sum(part for part in parts if part is not None)
        if measured is None:
            continue
        shares: dict[str, float] = {}
        levels = stage.recompute_levels()
        for layer, level in zip(stage.layer_indices, levels, strict=True):
            name = profile.layer_classes[layer]
            cost = _entry(profile.classes[name], plan, stage.degrees.tp)
            seconds = cost.forward_s if kind == "F" else _backward_s(cost, level)
            shares[name] = shares.get(name, 0.0) + seconds
        rows.append(_Row(shares, profile.action_overhead_s, measured))
    return rows


def _seconds(actions: Mapping[str, Mapping[str, float]], name: str) -> float | None:
    action = actions.get(name)
    if action is None:
        return None
    value = action.get("measured_s") if isinstance(action, Mapping) else None
    if not isinstance(value, (int, float)) or not value > 0:
        raise InvalidDocument(
            f"checks.time.actions.{name}.measured_s is {value!r}, not a positive number",
            field=f"checks.time.actions.{name}",
        )
    return float(value)


def _entry(value: LayerClass, plan: Plan, tensor_degree: int) -> ConfigurationCost:
    """Return the entry of the plan's configuration, or the nearest microbatch scaled in proportion."""
    wanted = plan.schedule.microbatch
    entries = [
        cost
        for cost in value.costs
        if cost.sequence_length == plan.job.sequence_length and cost.tensor_degree == tensor_degree
    ] or list(value.costs)
    if not entries:
        raise InvalidDocument("the profile has a class without measured costs", field="classes")
    return min(entries, key=lambda cost: (abs(cost.microbatch - wanted), cost.microbatch))


def _backward_s(cost: ConfigurationCost, level: Recompute) -> float:
    return cost.input_grad_s + cost.weight_grad_s + cost.recompute_s.get(level, 0.0)


def _factors(rows: Sequence[_Row], names: Sequence[str]) -> dict[str, float]:
    """Return the least-squares factor of each class; 1 for those that no row tells of."""
    if not rows:
        return dict.fromkeys(names, 1.0)
    shares = np.array([[row.shares.get(name, 0.0) for name in names] for row in rows])
    surplus = np.array([row.measured_s - row.rest_s for row in rows]) - shares.sum(axis=1)
    ridge = np.diag(np.sqrt(_RIDGE) * shares.sum(axis=0))
    change, *_ = np.linalg.lstsq(
        np.vstack([shares, ridge]), np.concatenate([surplus, np.zeros(len(names))]), rcond=None
    )
    return {name: float(np.clip(1.0 + value, *_LIMITS)) for name, value in zip(names, change, strict=True)}


def _mean_error(pairs: Sequence[tuple[_Row, Mapping[str, float]]]) -> float:
    errors = [
        abs((row.rest_s + sum(value * factors[name] for name, value in row.shares.items())) / row.measured_s - 1.0)
        for row, factors in pairs
    ]
    return float(np.mean(errors))


def _scaled(value: LayerClass, forward: float, backward: float) -> LayerClass:
    return value.model_copy(update={"costs": tuple(_scaled_cost(cost, forward, backward) for cost in value.costs)})


def _scaled_cost(cost: ConfigurationCost, forward: float, backward: float) -> ConfigurationCost:
    factors = {"forward_s": forward, "input_grad_s": backward, "weight_grad_s": backward, "split_excess_s": backward}
    changed = {name: factor for name, factor in factors.items() if abs(factor - 1.0) > 1e-12}
    if not changed:
        return cost
    return cost.model_copy(
        update={
            **{name: getattr(cost, name) * factor for name, factor in changed.items()},
            "recompute_s": {level: seconds * forward for level, seconds in cost.recompute_s.items()},
            "sources": {**cost.sources, **dict.fromkeys(changed, Source.FITTED)},
            "spread": {
                name: (low * factors.get(name, 1.0), high * factors.get(name, 1.0))
                for name, (low, high) in cost.spread.items()
            },
        }
    )
