"""Numbers for one microbatch size, or for several at once: a float, or an array with one entry a size.

The formulas of operators, collectives and layers take both, so that a search prices all sizes of a configuration at once.
"""

from __future__ import annotations

from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Number = float | Floats
N = TypeVar("N", float, Floats)


@overload
def larger(first: float, second: float) -> float: ...
@overload
def larger(first: Number, second: Floats) -> Floats: ...
@overload
def larger(first: Floats, second: Number) -> Floats: ...
@overload
def larger(first: Number, second: Number) -> Number: ...
def larger(first: Number, second: Number) -> Number:
    """Return the larger of two numbers, size by size."""
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return np.asarray(np.maximum(first, second))
    return max(first, second)


@overload
def smaller(first: float, second: float) -> float: ...
@overload
def smaller(first: Number, second: Floats) -> Floats: ...
@overload
def smaller(first: Floats, second: Number) -> Floats: ...
@overload
def smaller(first: Number, second: Number) -> Number: ...
def smaller(first: Number, second: Number) -> Number:
    """Return the smaller of two numbers, size by size."""
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return np.asarray(np.minimum(first, second))
    return min(first, second)


def is_positive(number: Number) -> bool:
    """Tell whether a number that is in proportion to the microbatch is above zero: for all sizes or for none."""
    return bool(number[0] > 0) if isinstance(number, np.ndarray) else number > 0
