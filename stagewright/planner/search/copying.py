"""Copies within compiled functions."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from numba import njit


@njit(cache=True, no_cpython_wrapper=True)
def copy_into(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """Copy a vector into one as long.

    `target[:] = source` does so too, but numba compiles with it what it would say of shapes that do not fit: strings, half a second
    of the processor's time in each process.
    """
    for place in range(len(source)):
        target[place] = source[place]
