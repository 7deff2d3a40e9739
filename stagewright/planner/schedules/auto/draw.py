"""Random draws for the kernels: splitmix64 (Steele, Lea and Flood, 2014) on an explicit state of one word.

Own draws rather than a library's, so that a seed gives the same orders whatever the library's version, and so that no
generator is hidden in a module. Period 2**64; every draw is a pure function of the state, which it advances.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
from numba import njit

State = npt.NDArray[np.uint64]


def seeded(seed: int) -> State:
    """Return a fresh state of shape [1]; the seed is hashed, so that neighbouring seeds do not walk the same sequence."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    return np.frombuffer(digest[:8], dtype="<u8").astype(np.uint64)


@njit(cache=True, no_cpython_wrapper=True, inline="always")
def uniform(state: State) -> float:
    """Return a draw from [0, 1)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    word = state[0]
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word = word ^ (word >> np.uint64(31))
    return float(word >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(cache=True, no_cpython_wrapper=True)
def below(state: State, count: int) -> int:
    """Return a draw from 0 .. count - 1."""
    return int(uniform(state) * count)


@njit(cache=True, no_cpython_wrapper=True)
def exponential(state: State) -> float:
    """Return a draw with mean 1."""
    return -math.log(1.0 - uniform(state))


@njit(cache=True, no_cpython_wrapper=True)
def normal(state: State) -> float:
    """Return a draw with mean 0 and variance 1 (Box and Muller)."""
    radius = math.sqrt(2.0 * exponential(state))
    return radius * math.cos(2.0 * math.pi * uniform(state))
