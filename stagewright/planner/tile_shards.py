"""Which tensors one device steps where ZeRO cuts its buckets between bands of tiles, as a run cuts them (`matrix_tiles`).

A bucket is what a stage reduces together: under ZeRO-1 all of its layers, else a layer, or a weight that several of its layers
share; divided experts are buckets of their own. Its tensors lie in the order in which the profile states them (`classes[].tensors`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain, pairwise
from math import prod

from stagewright.planner.cost.matrix_optimizer import BLOCK
from stagewright.planner.cost.memory import expert_shards
from stagewright.planner.documents.plan import Degrees, Plan
from stagewright.planner.documents.profile import LayerClass, ModelProfile, WeightTensor
from stagewright.planner.link_bytes import SharedWeight, divides_by_tiles, num_shards, shared_weights
from stagewright.planner.matrix_tiles import band_bounds, tile_sizes
from stagewright.planner.replica_shares import has_uneven_shares, replica_of

Shape = tuple[tuple[int, ...], bool]  # of a tensor, and whether it is a matrix


@dataclass(frozen=True)
class OwnedTensor:
    """`count` elements, from the `first` on, of a tensor of this shape on a device, which one of the devices steps."""

    shape: tuple[int, ...]
    is_matrix: bool
    first: int
    count: int

    @cached_property
    def tile_sizes(self) -> Mapping[tuple[int, int], int]:
        """Return how many tiles of which height and width the elements are; none unless it is a matrix."""
        return tile_sizes(self.shape, self.first, self.count) if self.is_matrix else {}


@dataclass(frozen=True)
class OwnedBucket:
    """What one device steps of a bucket with `size` elements.

    Parameters
    ----------
    share : of them that the device is meant to step, were there no tiles.
    layer : that the bucket is of; None where it is of several.
    of_experts : it is of divided experts.
    """

    size: int
    share: float
    tensors: tuple[OwnedTensor, ...]
    layer: int | None = None
    of_experts: bool = False

    @cached_property
    def owned(self) -> int:
        """Return the elements that the device steps."""
        return sum(each.count for each in self.tensors)


def owned_buckets(
    plan: Plan, profile: ModelProfile, index: int, bounds: Sequence[int], member: int
) -> tuple[OwnedBucket, ...] | None:
    """Return what a device of a stage steps, given its place among those of its pipeline rank.

    None where shards are even, or where it is not known which tensors there are or how a degree divides them. Weights that
    other stages share are left out.
    """
    degrees = plan.stages[index].degrees
    if not divides_by_tiles(plan) or not degrees.zero or degrees.tp * degrees.etp > 1:
        return None
    inside = range(bounds[index], bounds[index + 1])
    classes = [profile.classes[profile.layer_classes[layer]] for layer in inside]
    if not all(_are_known(each) for each in classes):
        return None
    ties = shared_weights(plan, profile)
    apart = [tie for tie in ties if len(tie.stages) == 1 and tie.layers[0] in inside] if degrees.zero > 1 else []
    shared = [[((int(tie.num_parameters),), False)] for tie in apart]
    dense = []
    for layer, kind in zip(inside, classes, strict=True):
        elsewhere = [tie for tie in ties if tie in apart or len(tie.stages) > 1 or layer != tie.layers[0]]
        dense.append(_dense(kind, degrees, [tie for tie in elsewhere if layer in tie.layers]))
    experts = [list(_experts(kind, degrees)) for kind in classes]
    shares, place = _shares(plan, index), member // degrees.tp % num_shards(plan, index)
    owners = expert_shards(degrees)
    own = (1 / owners,) * owners, member // degrees.expert_split % owners
    if degrees.zero == 1:
        one = _cut(chain(*dense), shares, place)
        other = _cut(chain(*experts), *own, of_experts=True)
        return tuple(each for each in (one, other) if each.size)
    found = [_cut(each, shares, place, layer=layer) for layer, each in zip(inside, dense, strict=True)]
    found += [_cut(each, shares, place) for each in shared]
    found += [_cut(each, *own, layer=layer, of_experts=True) for layer, each in zip(inside, experts, strict=True)]
    return tuple(each for each in found if each.size)


def unlike_members(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Return the places in a pipeline rank, those together whose devices hold as much; none where all devices do."""
    by_tiles = divides_by_tiles(plan) and any(stage.degrees.zero for stage in plan.stages)
    if not by_tiles and not has_uneven_shares(plan):
        return ()
    alike: dict[tuple[int, ...], list[int]] = {}
    for member in range(max(stage.degrees.num_devices for stage in plan.stages)):
        each = [stage.degrees for stage in plan.stages]
        key = tuple(member // degrees.tp if by_tiles else replica_of(degrees, member) for degrees in each)
        alike.setdefault(key, []).append(member)
    return tuple(map(tuple, alike.values()))


def _are_known(layer: LayerClass) -> bool:
    return not layer.is_trained or sum(each.count * each.num_elements for each in layer.tensors) == layer.parameters


def _each(layer: LayerClass) -> Iterator[WeightTensor]:
    for run in layer.tensors if layer.is_trained else ():
        for _ in range(run.count):
            yield run


def _dense(layer: LayerClass, degrees: Degrees, elsewhere: Iterable[SharedWeight]) -> list[Shape]:
    """Return the tensors of a layer that are reduced with all replicas, without some shared ones."""
    divided = degrees.expert_split > 1
    found = [(each.shape, each.is_matrix) for each in _each(layer) if not (divided and each.of_experts)]
    for tie in elsewhere:
        shared = next((each for each in found if prod(each[0]) == tie.num_parameters and not each[1]), None)
        if shared is not None:
            found.remove(shared)
    return found


def _experts(kind: LayerClass, degrees: Degrees) -> Iterator[Shape]:
    """Yield the tensors of a layer's divided experts on one device: all experts are alike."""
    if degrees.expert_split == 1:
        return
    own = [each for each in _each(kind) if each.of_experts]
    stacks = any(each.num_matrices > 1 for each in own)
    for each in own if stacks else own[: len(own) // degrees.ep]:
        shape = (each.shape[0] // degrees.ep, *each.shape[1:]) if stacks else each.shape
        yield shape, each.is_matrix


def _shares(plan: Plan, index: int) -> tuple[float, ...]:
    """Return the share of each place of a stage's states that are not of divided experts."""
    stage, count = plan.stages[index], num_shards(plan, index)
    if not stage.state_shares:
        return (1 / count,) * count
    return tuple(share / stage.degrees.cp for share in stage.state_shares for _ in range(stage.degrees.cp))


def _cut(
    tensors: Iterable[Shape],
    shares: tuple[float, ...],
    place: int,
    *,
    layer: int | None = None,
    of_experts: bool = False,
) -> OwnedBucket:
    """Return what the device at a place steps of neighbouring tensors."""
    each = tuple(tensors)
    size = sum(prod(shape) for shape, _ in each)
    return OwnedBucket(size, shares[place], _pieces(each, shares)[place], layer, of_experts)


@lru_cache(maxsize=256)
def _pieces(tensors: tuple[Shape, ...], shares: tuple[float, ...]) -> tuple[tuple[OwnedTensor, ...], ...]:
    """Return what of neighbouring tensors each device steps."""
    bounds = band_bounds([(shape, BLOCK * is_matrix) for shape, is_matrix in tensors], shares)
    ends = list(accumulate(prod(shape) for shape, _ in tensors))
    found = []
    for begin, end in pairwise(bounds):
        pieces = []
        for at in range(bisect_right(ends, begin), bisect_left(ends, end) + 1) if begin < end else ():
            shape, is_matrix = tensors[at]
            first = ends[at] - prod(shape)
            pieces.append(OwnedTensor(shape, is_matrix, max(begin - first, 0), min(end, ends[at]) - max(begin, first)))
        found.append(tuple(pieces))
    return tuple(found)
