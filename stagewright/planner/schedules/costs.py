"""Durations and activation sizes of the virtual stages, as schedules and simulators take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class StageCosts:
    """Costs of one microbatch on each virtual stage; every array has shape [num_stages].

    Parameters
    ----------
    forward_s, input_grad_s, weight_grad_s : seconds of F, I and W; a full backward takes I + W.
    activation : memory held from F on, in any unit: bytes, or shares of a rank's microbatch.
    freed_at_input_grad : share of `activation` given back at the end of I; the rest goes at the end of W. Negative where
        more waits for W than the forward kept: it comes at the start of I.
    recompute_s : seconds that run the forward again before the backward (inside I, or as an R action).
    """

    forward_s: Floats
    input_grad_s: Floats
    weight_grad_s: Floats
    activation: Floats
    freed_at_input_grad: Floats
    recompute_s: Floats

    @property
    def num_stages(self) -> int:
        return len(self.forward_s)

    def without_growth(self) -> StageCosts:
        """Return costs whose I adds no memory: what waits for W beyond the activation counts from F on."""
        grows = self.freed_at_input_grad < 0
        if not grows.any():
            return self
        activation = np.where(grows, self.activation * (1.0 - self.freed_at_input_grad), self.activation)
        return replace(self, activation=activation, freed_at_input_grad=np.maximum(self.freed_at_input_grad, 0.0))

    def repeated(self, times: int) -> StageCosts:
        """Return the costs of `times` copies of the stages, one after the other."""
        if times == 1:
            return self
        return StageCosts(**{field.name: np.tile(getattr(self, field.name), times) for field in fields(self)})

    @classmethod
    def of(
        cls,
        forward_s: Sequence[float] | Floats,
        input_grad_s: Sequence[float] | Floats,
        weight_grad_s: Sequence[float] | Floats,
        *,
        activation: Sequence[float] | Floats | None = None,
        freed_at_input_grad: Sequence[float] | Floats | None = None,
        recompute_s: Sequence[float] | Floats | None = None,
    ) -> StageCosts:
        """Return validated costs; activations default to 1, the rest to 0.

        Raises InvalidArgument for a length that differs, a value that is not finite, a negative one, a zero duration, or a
        share above 1.
        """
        count = len(forward_s)
        arrays = {
            "forward_s": _array(forward_s),
            "input_grad_s": _array(input_grad_s),
            "weight_grad_s": _array(weight_grad_s),
            "activation": np.ones(count) if activation is None else _array(activation),
            "freed_at_input_grad": np.zeros(count) if freed_at_input_grad is None else _array(freed_at_input_grad),
            "recompute_s": np.zeros(count) if recompute_s is None else _array(recompute_s),
        }
        for name, values in arrays.items():
            _check(name, values, count, lowest=_LOWEST.get(name, 0.0))
        _check_share(arrays["freed_at_input_grad"])
        return cls(**arrays)

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        *,
        forward_s: float = 1.0,
        input_grad_s: float = 1.0,
        weight_grad_s: float = 1.0,
        num_chunks: int = 1,
    ) -> StageCosts:
        """Return equal stages; the seconds are one rank's whole share, which its chunks divide, and so is activation 1."""
        ones = np.ones(num_stages) / num_chunks
        return cls.of(ones * forward_s, ones * input_grad_s, ones * weight_grad_s, activation=ones)


def _array(values: Sequence[float] | Floats) -> Floats:
    return np.asarray(values, dtype=np.float64)


# Durations are above 0; of a share there may be less than nothing.
_LOWEST = {
    "forward_s": np.nextafter(0.0, 1.0),
    "input_grad_s": np.nextafter(0.0, 1.0),
    "weight_grad_s": np.nextafter(0.0, 1.0),
    "freed_at_input_grad": -np.inf,
}


def _check(name: str, values: Floats, count: int, *, lowest: float) -> None:
    if values.shape != (count,):
        raise InvalidArgument(f"{name} has {values.shape} values, forward_s has {count}", field=name)
    if not np.isfinite(values).all():
        raise InvalidArgument(f"{name} holds {values[~np.isfinite(values)][0]}, a cost is a finite number", field=name)
    bad = values < lowest
    if bad.any():
        index = int(np.argmax(bad))
        bound = "above 0" if lowest > 0 else "at least 0"
        raise InvalidArgument(f"{name}[{index}] is {values[index]:g}, it must be {bound}", field=f"{name}[{index}]")


def _check_share(values: Floats) -> None:
    if (values > 1).any():
        index = int(np.argmax(values))
        raise InvalidArgument(
            f"freed_at_input_grad[{index}] is {values[index]:g}, I can give back no more than 1, all that was kept",
            field=f"freed_at_input_grad[{index}]",
        )
