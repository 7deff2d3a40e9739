"""What the launcher tells each rank, as one JSON file in the run's directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stagewright.planner.documents.document import write_text
from stagewright.runtime.training import TrainingSettings


@dataclass(frozen=True)
class RunJob:
    """A run.

    Parameters
    ----------
    directory : where plan.json, profile.json and everything the run leaves behind are.
    model, data : references to factories, `module:factory` or `path.py:factory`; data may be None.
    steps : timed training steps.
    checks : of gradients, memory, traffic, time.
    num_threads : of each rank on CPU.
    seed : of weights and random numbers.
    check_steps : steps after which weights are compared.
    training : of the steps after the checks.
    working_directory : where the command was called; relative references are looked up there.
    launcher : process that must live for the ranks to go on.
    rescue : a rank that learns of a lost one leaves what it holds.
    emulate : actions wait their planned time instead of computing.
    """

    directory: str
    model: str
    data: str | None
    steps: int
    checks: tuple[str, ...]
    num_threads: int
    working_directory: str
    launcher: int
    seed: int = 0
    check_steps: int = 3
    training: TrainingSettings = field(default_factory=TrainingSettings)
    emulate: bool = False
    rescue: bool = False

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.directory)

    def save(self) -> Path:
        """Write the job into its directory; returns the file."""
        target = self.path / "job.json"
        write_text(target, json.dumps(asdict(self), indent=1))
        return target

    @classmethod
    def load(cls, path: Path | str) -> RunJob:
        """Return the job in a file that `save` wrote."""
        values = json.loads(Path(path).read_text())
        training = TrainingSettings(**values.pop("training"))
        return cls(**{**values, "checks": tuple(values["checks"]), "training": training})
