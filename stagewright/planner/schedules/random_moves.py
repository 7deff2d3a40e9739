"""What compiled searches over orders share: seeded numbers, and moving one letter of an order elsewhere."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

RandomState = npt.NDArray[np.uint64]


@njit(cache=True, no_cpython_wrapper=True)
def uniform(state: RandomState) -> float:
    """Return a number in [0, 1) and advance the state, one uint64 (SplitMix64, Steele et al., OOPSLA 2014)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    mixed = state[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return float(mixed >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(cache=True, no_cpython_wrapper=True)
def shift(letters: npt.NDArray[np.int32], source: int, target: int) -> None:
    """Move one letter to another place, in place; those between make room."""
    letter = letters[source]
    step = 1 if target > source else -1
    for at in range(source, target, step):
        letters[at] = letters[at + step]
    letters[target] = letter
