"""Checkpoints that any plan can continue: saved under one plan, loaded under another.

A checkpoint holds whole tensors by name: each trainable parameter (`weights/NAME`), each tensor of its optimizer state
(`states/NAME/KEY`), and the step. Parameters are gathered over tensor-parallel and sharded ranks before they are saved;
torch's distributed checkpoint writes each tensor once, from one of the ranks that hold it, in parallel. A rank that loads
reads the names it holds under its own plan and keeps its part. Elementwise optimizers continue exactly.

Weights that several stages share are saved under their first name. Asynchronous schedules save the newest weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from stagewright.planner.errors import InvalidArgument
from stagewright.runtime.rescue import owners, rescued_step
from stagewright.runtime.worker import Worker


def save_checkpoint(worker: Worker, directory: Path | str, *, step: int) -> None:
    """Write weights, optimizer states and the step; every rank calls this."""
    import torch.distributed.checkpoint as torch_checkpoint  # takes a second to import

    torch_checkpoint.save(whole_state(worker) | {"step": torch.tensor(step)}, checkpoint_id=str(directory))


def whole_state(worker: Worker) -> dict[str, Tensor]:
    """Return copies of a rank's weights and optimizer states by their names in a checkpoint; a collective."""
    state = {f"weights/{name}": value for name, value in _canonical(worker, worker.weights()).items()}
    for key, values in worker.optimizer_states().items():
        state |= {f"states/{name}/{key}": value for name, value in _canonical(worker, values).items()}
    return state


def load_checkpoint(worker: Worker, directory: Path | str) -> int:
    """Set weights and optimizer states from a checkpoint and return its step; every rank calls this.

    A folder of what survivors left (`rescue`) is a checkpoint too. The worker's optimizer must be in use already.

    Raises
    ------
    InvalidArgument : when the checkpoint lacks a tensor of this model, or holds one of another shape.
    """
    step = rescued_step(Path(directory))
    if step is not None:
        _load_rescued(worker, Path(directory), step)
        return step
    import torch.distributed.checkpoint as torch_checkpoint

    reader = torch_checkpoint.FileSystemReader(str(directory))
    stored = reader.read_metadata().state_dict_metadata
    names = canonical_names(worker)
    weights = worker.weights()
    state: dict[str, Tensor] = {"step": torch.tensor(0)}
    for name, value in weights.items():
        state[f"weights/{names[name]}"] = _matching(stored, f"weights/{names[name]}", value)
    keys = sorted({entry.rpartition("/")[2] for entry in stored if entry.startswith("states/")})
    for key in keys:
        for name, value in weights.items():
            entry = f"states/{names[name]}/{key}"
            if entry not in stored:  # what no forward uses has no states
                continue
            shape = stored[entry].size
            state[entry] = torch.zeros(shape, dtype=stored[entry].properties.dtype, device=value.device)
    torch_checkpoint.load(state, checkpoint_id=str(directory))
    worker.load_weights({name: state[f"weights/{names[name]}"] for name in weights})
    worker.load_optimizer_states(
        {key: _found(state, {name: f"states/{names[name]}/{key}" for name in weights}) for key in keys}
    )
    dist.barrier()
    return int(state["step"])


def _load_rescued(worker: Worker, folder: Path, step: int) -> None:
    """Set weights and optimizer states from the files of surviving ranks."""
    names, files = canonical_names(worker), owners(folder, step)
    weights = worker.weights()
    lacking = sorted(names[name] for name in weights if names[name] not in files)
    if lacking:
        raise InvalidArgument(f"no survivor holds {lacking[0]!r} as of step {step}", field="checkpoint")
    opened = {file: torch.load(file, mmap=True, weights_only=True) for file in {files[names[name]] for name in weights}}
    found = {name: opened[files[names[name]]] for name in weights}
    states: dict[str, dict[str, Tensor]] = {}
    for name in weights:
        prefix = f"states/{names[name]}/"
        for entry in found[name]:
            if entry.startswith(prefix):
                states.setdefault(entry.removeprefix(prefix), {})[name] = found[name][entry]
    worker.load_weights({name: found[name][f"weights/{names[name]}"] for name in weights})
    worker.load_optimizer_states(states)
    dist.barrier()


def _found(state: dict[str, Tensor], entries: dict[str, str]) -> dict[str, Tensor]:
    """Return by name those of the entries that there are."""
    return {name: state[entry] for name, entry in entries.items() if entry in state}


def _matching(stored: dict[str, object], entry: str, value: Tensor) -> Tensor:
    found = stored.get(entry)
    if found is None or tuple(found.size) != tuple(value.shape):  # type: ignore[attr-defined]
        shape = "nothing" if found is None else f"shape {tuple(found.size)}"  # type: ignore[attr-defined]
        raise InvalidArgument(
            f"the checkpoint holds {shape} under {entry!r}, the model needs {tuple(value.shape)}", field="checkpoint"
        )
    return torch.empty_like(value)


def canonical_names(worker: Worker) -> dict[str, str]:
    """Return the name a parameter is saved under by the name the worker has for it."""
    first = {name: tie.parameter for tie in worker.chain.ties for name in tie.names}
    return {name: first.get(name, name) for name in worker.parameters()}


def _canonical(worker: Worker, values: dict[str, Tensor]) -> dict[str, Tensor]:
    names = canonical_names(worker)
    return {names[name]: value.contiguous() for name, value in values.items()}
