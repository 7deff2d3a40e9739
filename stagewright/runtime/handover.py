"""Going on under another plan without a checkpoint: each rank gets what it lacks from one that has it.

A state is whole tensors by name, weights and optimizer states, as a checkpoint holds them. Every tensor has an owner, the
lowest rank that holds it; ranks that will need it and do not hold it yet get it by message, so moving a few layers
between two stages at a step boundary sends those layers and nothing else.

Paper: Zhao et al., vPipe: A Virtualized Acceleration System for Achieving Efficient and Scalable Pipeline Parallel DNN
Training, TPDS 2022 (live migration of layers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stagewright.planner.errors import InvalidArgument
from stagewright.runtime.checkpoint import canonical_names, whole_state
from stagewright.runtime.worker import Worker

_Meta = tuple[tuple[int, ...], str]


@dataclass(frozen=True)
class HeldState:
    """What one rank holds between two steps: `weights/NAME` and `states/NAME/KEY`, whole."""

    tensors: Mapping[str, Tensor]


def held_state(worker: Worker) -> HeldState:
    """Return copies of a worker's weights and optimizer states; every rank calls this."""
    return HeldState(whole_state(worker))


def continue_from(worker: Worker, state: HeldState) -> float:
    """Set a worker's weights and optimizer states from what the ranks held; returns the bytes this rank received.

    The worker's optimizer must be in use already; every rank calls this.

    Raises
    ------
    InvalidArgument : when no rank holds a tensor that is needed.
    """
    names = canonical_names(worker)
    weights = list(worker.weights())
    described = {name: (tuple(value.shape), str(value.dtype)) for name, value in state.tensors.items()}
    everyone: list[dict[str, _Meta]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, described)
    keys = sorted({name.rpartition("/")[2] for each in everyone for name in each if name.startswith("states/")})
    wanted = {f"weights/{names[name]}" for name in weights}
    held = {name for each in everyone for name in each}
    wanted |= {f"states/{names[name]}/{key}" for name in weights for key in keys} & held  # unused ones have none
    have, received = _exchange(state, everyone, wanted, worker.settings.device)
    worker.load_weights({name: have[f"weights/{names[name]}"] for name in weights})
    if keys:
        worker.load_optimizer_states(
            {
                key: {name: have[entry] for name in weights if (entry := f"states/{names[name]}/{key}") in have}
                for key in keys
            }
        )
    return received


def _exchange(
    state: HeldState, everyone: list[dict[str, _Meta]], wanted: set[str], device: torch.device
) -> tuple[dict[str, Tensor], float]:
    """Return the wanted tensors by name, and the bytes that came from others."""
    rank = dist.get_rank()
    needs: list[list[str]] = [[]] * len(everyone)
    dist.all_gather_object(needs, sorted(wanted - set(state.tensors)))
    have = {name: value for name, value in state.tensors.items() if name in wanted}
    received, works = 0.0, []
    for name in sorted({name for each in needs for name in each}):
        owners = [other for other, each in enumerate(everyone) if name in each]
        if not owners:
            raise InvalidArgument(f"no rank holds {name!r}", field="state", hint="continue from a checkpoint")
        for taker, each in enumerate(needs):
            if name not in each:
                continue
            if rank == owners[0]:
                works.append(dist.isend(state.tensors[name].to(device), taker))
            elif rank == taker:
                shape, dtype = everyone[owners[0]][name]
                value = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
                dist.recv(value, owners[0])
                have[name] = value
                received += value.numel() * value.element_size()
    for work in works:
        assert work is not None
        work.wait()
    return have, received
