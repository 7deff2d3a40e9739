"""Counts what emulated devices receive."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Wire:
    """Moves blocks between emulated devices and counts the elements each one receives."""

    def __init__(self, num_devices: int) -> None:
        self.received = [0] * num_devices

    def send(self, block: Array, source: int, target: int) -> Array:
        """Return the block as `target` has it; what stays on a device is free."""
        if source != target:
            self.received[target] += block.size
        return block

    @property
    def most_received(self) -> int:
        """Elements received by the device that received most."""
        return max(self.received)
