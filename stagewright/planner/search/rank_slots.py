"""What the ranks of an order hold, as arrays of one shape for all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RankSlots:
    """What ranks hold, padded to rectangles: V slots and N vectors a rank at most.

    `stage` int [D, V] with -1 where there is none; `live` float [D, N, 2, V] with zeros there.
    """

    stage: Longs
    live: Floats

    @classmethod
    def of(cls, stages: Sequence[Sequence[int]], vectors: Sequence[Floats]) -> RankSlots:
        """Return the slots of ranks that hold some stages and some vectors, [vectors, 2, stages], each."""
        width = max(map(len, stages))
        stage = np.full((len(stages), width), -1, dtype=np.int64)
        live = np.zeros((len(stages), max(map(len, vectors)), 2, width))
        for rank, (held, own) in enumerate(zip(stages, vectors, strict=True)):
            stage[rank, : len(held)] = held
            live[rank, : len(own), :, : len(held)] = own
        return cls(stage, live)

    def on_ranks(self, by_stage: Floats) -> Floats:
        """Return what stages have [S] as their ranks hold it, [D, V], zero where a rank has no more slots."""
        return np.where(self.stage >= 0, by_stage[..., self.stage], 0.0)

    def part(self, ranks: Sequence[int], stages: Sequence[int]) -> RankSlots:
        """Return the slots of some ranks, which hold none but some stages; the stages are numbered as they come there."""
        place = np.full(int(self.stage.max()) + 2, -1, dtype=np.int64)  # the last entry stands for no slot
        place[list(stages)] = np.arange(len(stages))
        return RankSlots(place[self.stage[list(ranks)]], self.live[list(ranks)])

    @cached_property
    def held(self) -> Floats:
        """How often each stage stands on each rank, [D, S]."""
        held = np.zeros((len(self.stage), int(self.stage.max()) + 1))
        rank, place = np.nonzero(self.stage >= 0)
        np.add.at(held, (rank, self.stage[rank, place]), 1.0)
        return held
