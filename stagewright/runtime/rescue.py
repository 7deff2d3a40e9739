"""Going on from what surviving replicas hold when a rank is lost. Imports no torch at the top; the launcher reads this too.

Where a stage has replicas, its weights and optimizer states outlive any one of them. A rank that learns of a loss writes
what it holds into the run's directory before it ends: a file of tensors, and a note of how many updates each stage had had.
If some number of updates is held for every stage, the next run starts there; else from the last checkpoint. A rank whose
optimizer is at work waits for it, so no tensor is half updated.

What needs other ranks to be whole cannot be written by one: shards of ZeRO, tensor-parallel parts, divided experts, and
asynchronous schedules, whose weights have several versions.

Paper: Jang et al., Oobleck, SOSP 2023 (recovery copies layers from surviving replicas).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stagewright.planner.documents.document import write_text
from stagewright.planner.documents.plan import Plan

if TYPE_CHECKING:
    from stagewright.runtime.worker import Worker

_STEP = "rescued-step"
_WAIT_S = 5.0


def is_rescuable(plan: Plan) -> bool:
    """Whether each rank of a plan holds whole tensors, and some stage more than once."""
    degrees = [stage.degrees for stage in plan.stages]
    whole = all(each.zero == 0 and each.tp == each.ep == 1 for each in degrees)
    copies = len(plan.schedule.placement) > 1 or any(each.dp * each.cp > 1 for each in degrees)
    return whole and copies and "local_steps" not in plan.schedule.parameters


def rescue_folder(directory: Path) -> Path:
    """Return where the ranks of the run in `directory` leave what they hold."""
    return directory / "rescued"


def has_rescued(directory: Path, rank: int) -> bool:
    """Whether a rank has written all that it holds."""
    return _note(rescue_folder(directory), rank).exists()


@dataclass
class Rescue:
    """One rank's duty to leave what it holds, once, whichever thread learns of the loss first.

    Parameters
    ----------
    folder : where to; rank : whose.
    worker : what holds the states, from the first training step on.
    first_step : updates that the states had had when the worker got them.
    """

    folder: Path
    rank: int
    worker: Worker | None = None
    first_step: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Write the states; a second call waits for the first. Nothing is written while an optimizer does not end."""
        with self._lock:
            if self.worker is None or _note(self.folder, self.rank).exists():
                return
            with self.worker.between_updates(_WAIT_S) as updates:
                if updates is not None:
                    self._save(self.worker, {stage: self.first_step + count for stage, count in updates.items()})

    def _save(self, worker: Worker, updates: Mapping[int, int]) -> None:
        import torch

        from stagewright.runtime.checkpoint import whole_state

        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(whole_state(worker), self.folder / f"rank-{self.rank}.pt")
        names = {name: updates[stage] for stage, held in worker.stage_parameters().items() for name in held}
        write_text(_note(self.folder, self.rank), json.dumps({"stages": updates, "weights": names}))


def complete_rescue(plan: Plan, directory: Path) -> int | None:
    """Return after how many steps survivors hold every stage, and mark their folder as one to load; None for none."""
    folder = rescue_folder(directory)
    held = [{(int(stage), count) for stage, count in note["stages"].items()} for note in _notes(folder).values()]
    everything = set().union(*held)
    counts = {count for _, count in everything}
    whole = [n for n in counts if n > 0 and all((stage, n) in everything for stage in range(len(plan.stages)))]
    if not whole:
        return None
    write_text(folder / _STEP, str(max(whole)))
    return max(whole)


def rescued_step(folder: Path) -> int | None:
    """Return the step of a folder that `complete_rescue` marked; None for another folder."""
    marker = folder / _STEP
    return int(marker.read_text()) if marker.exists() else None


def owners(folder: Path, step: int) -> dict[str, Path]:
    """Return the file that holds each parameter as it was after `step` steps; of several, the lowest rank's."""
    found: dict[str, Path] = {}
    for rank, note in sorted(_notes(folder).items(), reverse=True):
        found |= {name: folder / f"rank-{rank}.pt" for name, count in note["weights"].items() if count == step}
    return found


def _note(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def _notes(folder: Path) -> dict[int, dict[str, dict[str, int]]]:
    return {int(path.stem.partition("-")[2]): json.loads(path.read_text()) for path in folder.glob("rank-*.json")}
