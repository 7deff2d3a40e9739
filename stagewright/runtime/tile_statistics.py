"""Statistics of tiles, as checkpoints hold them: by their tile's number in the whole tensor, wherever they are kept.

An optimizer keeps them as `left.3` beside a parameter that is one tensor, and as `left@2.3` beside one with several, by the tensor's
place. Where a group divides a tensor's experts, each rank counts the tiles of its own; where one splits the tensor itself, each
keeps those of some tiles.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from stagewright.modeling.tensor_parallel import TensorShards
from stagewright.planner.matrix_tiles import num_tiles


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


def whole_statistics(own: Mapping[str, Tensor], parameter: Tensor, shards: TensorShards) -> dict[str, Tensor]:
    """Return copies of a tensor's statistics by their tiles' numbers in the whole; a collective where it is divided."""
    split, experts = shards.tensor_split(parameter), shards.groups.get(id(parameter))
    found = {key: value.clone() for key, value in own.items()}
    if split is not None:
        gathered = everyones(found, split.group.group, parameter.device)
        found = {key: value for each in gathered for key, value in each.items()}
    if experts is None:
        return found
    return {
        _moved(key, place * _num_tiles(parameter, shards)): value
        for place, each in enumerate(everyones(found, experts.group, parameter.device))
        for key, value in each.items()
    }


def own_statistics(
    whole: Mapping[str, Tensor], parameter: Tensor, shards: TensorShards, kept: Collection[int]
) -> dict[str, Tensor]:
    """Return those of a tensor's statistics that this rank keeps, by the numbers that its tiles have here."""
    experts = shards.groups.get(id(parameter))
    before = 0 if experts is None else experts.index * _num_tiles(parameter, shards)
    moved = {_moved(key, -before): value for key, value in whole.items()}
    return {key: value for key, value in moved.items() if _number(key) in kept}


def _num_tiles(parameter: Tensor, shards: TensorShards) -> int:
    """Return how many tiles the tensors have of which a parameter holds a part, without other ranks' experts."""
    split = shards.tensor_split(parameter)
    return num_tiles(parameter.shape if split is None else split.whole_shape(parameter.shape))


def _number(key: str) -> int:
    return int(key.rpartition(".")[2])


def _moved(key: str, by: int) -> str:
    return f"{key.rpartition('.')[0]}.{_number(key) + by}"
