"""Statistics of tiles, as checkpoints hold them: by their tile's number in the whole tensor, wherever they are kept.

An optimizer keeps them as `left.3` beside a parameter that is one tensor, and as `left@2.3` beside one with several, by the tensor's
place. Where a group divides a tensor's experts, each rank counts the tiles of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from stagewright.modeling.tensor_collectives import TensorGroup
from stagewright.runtime.matrix_layout import num_tiles


def is_statistics(key: str) -> bool:
    """Whether a state is one of a tile."""
    return "." in key


def everyones(own: Mapping[str, Tensor], group: dist.ProcessGroup, device: torch.device) -> list[dict[str, Tensor]]:
    """Return copies of what each rank of a group has, in their order; a collective."""
    held: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{} for _ in range(group.size())]
    dist.all_gather_object(held, {key: (tuple(value.shape), value.dtype) for key, value in own.items()}, group=group)
    rank, found = dist.get_group_rank(group, dist.get_rank()), []
    for place, each in enumerate(held):
        source, values = dist.get_global_rank(group, place), {}
        for key, (shape, dtype) in sorted(each.items()):
            value = own[key].clone() if place == rank else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(value, source, group=group)
            values[key] = value
        found.append(values)
    return found


def whole_statistics(
    own: Mapping[str, Tensor], shape: Sequence[int], experts: TensorGroup | None, device: torch.device
) -> dict[str, Tensor]:
    """Return copies of a tensor's statistics by their tiles' numbers in the whole one; a collective where `experts` divide it."""
    if experts is None:
        return {key: value.clone() for key, value in own.items()}
    return {
        _moved(key, place * num_tiles(shape)): value
        for place, found in enumerate(everyones(own, experts.group, device))
        for key, value in found.items()
    }


def own_statistics(whole: Mapping[str, Tensor], shape: Sequence[int], experts: TensorGroup | None) -> dict[str, Tensor]:
    """Return those of a tensor's statistics that belong to this rank's part of it, by the numbers that its tiles have here."""
    if experts is None:
        return dict(whole)
    before = experts.index * num_tiles(shape)
    moved = {_moved(key, -before): value for key, value in whole.items()}
    return {key: value for key, value in moved.items() if 0 <= _number(key) < num_tiles(shape)}


def _number(key: str) -> int:
    return int(key.rpartition(".")[2])


def _moved(key: str, by: int) -> str:
    return f"{key.rpartition('.')[0]}.{_number(key) + by}"
