"""How a run trains: the optimizer's numbers, clipping, the learning rate over time, and checkpoints. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stagewright.planner.errors import InvalidArgument
from stagewright.runtime.rescue import rescued_step

WARM_UP_STEPS = 2  # of a run that starts anew, before its memory is measured and its steps are timed

_LATEST = "latest"


@dataclass(frozen=True)
class TrainingSettings:
    """What the training steps of a run are told beside the plan; the optimizer is the plan's job's.

    Parameters
    ----------
    learning_rate, momentum, weight_decay : of the optimizer.
    clip_norm : largest 2-norm of the gradient of the whole model, over all ranks; None does not clip.
    skip_nonfinite : take no step when a gradient of the model is not finite.
    learning_rate_schedule : reference to a function of the step's number, from 0, that returns what the learning rate is
        multiplied with; None keeps it.
    save : directory for checkpoints, one folder a saved step; None saves none.
    save_every : steps between two checkpoints; the last step is saved in any case.
    load : checkpoint to go on from, or a directory that `save` named; None starts anew.
    """

    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float | None = None
    skip_nonfinite: bool = False
    learning_rate_schedule: str | None = None
    save: str | None = None
    save_every: int | None = None
    load: str | None = None

    def __post_init__(self) -> None:
        positive = {"learning_rate": self.learning_rate, "clip_norm": self.clip_norm, "save_every": self.save_every}
        for name, value in positive.items():
            if value is not None and not 0 < value < float("inf"):
                raise InvalidArgument(f"{name} is {value:g}, it must be above 0 and finite", field=name)
        if not 0 <= self.weight_decay < float("inf") or not 0 <= self.momentum < 1:
            raise InvalidArgument(
                f"weight_decay is {self.weight_decay:g} and momentum {self.momentum:g}; the one must be at least 0, the "
                "other below 1",
                field="weight_decay",
            )
        if self.save_every is not None and self.save is None:
            raise InvalidArgument(
                f"save_every is {self.save_every}, and there is no directory to save in",
                field="save_every",
                hint="add --save DIR",
            )
        if self.load is not None:
            find_checkpoint(self.load)

    def is_saved(self, step: int, *, is_last: bool) -> bool:
        """Whether a checkpoint is due when `step` steps are done."""
        return self.save is not None and (is_last or (self.save_every is not None and step % self.save_every == 0))


def checkpoint_folder(directory: Path | str, step: int) -> Path:
    """Return where the checkpoint of a step stands."""
    return Path(directory) / f"step-{step}"


def mark_latest(directory: Path | str, step: int) -> None:
    """Record that the checkpoint of a step is complete."""
    from stagewright.planner.documents.document import write_text

    write_text(Path(directory) / _LATEST, str(step))


def latest_step(directory: Path | str) -> int | None:
    """Return the step of the newest complete checkpoint in a directory; None when there is none."""
    marker = Path(directory) / _LATEST
    return int(marker.read_text()) if marker.exists() else None


def find_checkpoint(directory: Path | str) -> Path:
    """Return a checkpoint's folder, given it or the directory of several; raises InvalidArgument where there is none."""
    step = latest_step(directory)
    folder = Path(directory) if step is None else checkpoint_folder(directory, step)
    if not (folder / ".metadata").exists() and rescued_step(folder) is None:
        raise InvalidArgument(
            f"{folder} holds no checkpoint", field="load", hint="name a directory that a run was told to --save in"
        )
    return folder
