"""What a run measures, as rank 0 hands it to the launcher: plain numbers and lists, JSON in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from stagewright.planner.documents.document import write_text
from stagewright.planner.simulation.timeline import Timeline


@dataclass(frozen=True)
class Measurement:
    """Raw results of a run.

    Parameters
    ----------
    step_times_s : seconds of each timed step, from the first action of any rank to the last.
    losses : mean loss of each timed step.
    first_step : number of the first timed step, from 0; warm-up and memory steps, and those before a checkpoint, precede it.
    peak_memory_bytes : highest of each global rank, without what the framework holds.
    static_memory_bytes : parameters, gradients and optimizer states of each global rank, by item.
    sent_bytes : bytes sent in one step by operation, over all ranks.
    rows : spans of the step with the median time: (rank, lane, KIND .. FUSED, start, end).
    probe_s : of each timed step, by global rank, seconds of the speed probe around it; empty on CUDA and when emulated.
    stolen_share : of each timed step with probes, the share of it that the host took from a rank's core.
    gradients, weights : largest error and the parameter that has it, when they were checked.
    """

    step_times_s: list[float]
    losses: list[float]
    first_step: int = 0
    peak_memory_bytes: list[float] = field(default_factory=list)
    static_memory_bytes: list[dict[str, float]] = field(default_factory=list)
    sent_bytes: dict[str, float] = field(default_factory=dict)
    rows: list[list[float]] = field(default_factory=list)
    gradients: tuple[float, str] | None = None
    weights: tuple[float, str] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    probe_s: list[list[float]] = field(default_factory=list)
    stolen_share: list[float] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the file."""
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Measurement:
        """Return the measurement in a file."""
        values = json.loads(path.read_text())
        for name in ("gradients", "weights"):
            values[name] = None if values[name] is None else tuple(values[name])
        return cls(**values)

    def timeline(self, num_ranks: int) -> Timeline:
        """Return the recorded step as a timeline of global ranks, from its first action on."""
        rows = np.array(self.rows, dtype=np.float64).reshape(-1, 10)
        rows = rows[np.lexsort((rows[:, 8], rows[:, 1], rows[:, 0]))]
        begin = rows[:, 8].min() if len(rows) else 0.0
        return Timeline(
            source="measured",
            num_ranks=num_ranks,
            rank=rows[:, 0].astype(np.int32),
            lane=rows[:, 1].astype(np.int32),
            action=rows[:, 2:8].astype(np.int32),
            start_s=rows[:, 8] - begin,
            end_s=rows[:, 9] - begin,
            link_bytes=dict(self.sent_bytes),
        )


def probes_around(behind_s: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return for each step, by rank, the mean of the probe behind it and of the one behind the step before.

    The first step has only the one behind it.
    """
    before_s = [*behind_s[:1], *behind_s[:-1]]
    return [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(before_s, behind_s, strict=True)]
