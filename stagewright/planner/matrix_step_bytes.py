"""What a step of Muon or Shampoo holds beside the states; tensors are stepped one after the other, so the largest need counts.

With s bytes a number of what is stepped, e of what is gathered for Newton-Schulz (2, in fp64 8) and i of what it runs in (e, on
processors at least 4), a tensor of n elements on a device, of a matrix of N over the tensor-parallel group, needs under Muon

    s n [gradients are narrower]  +  max( e n [e < s] + 2 e N [it is gathered],  e N [e < s or gathered] + i NS )

with NS of `newton_schulz_elements`, and any other tensor the sum of squares of e n, which processors take in fp32. Under ZeRO the
momentum of a bucket of S elements is gathered first, from each device's own part of it and by gloo in a copy, and stays
beside each of its matrices. Shampoo needs s n for the direction, as much where gradients are narrower, and the tile of
`shampoo_step_bytes` for a matrix, in a step that renews its roots. Of one that a group splits, with gradients of g bytes, it needs
beside the direction

    max( 2 g N,  (g + s) N + tile,  2 s N + s n )

the gradient as it is gathered, beside the directions of its tiles, and these as they are scattered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stagewright.planner.cost.matrix_optimizer import GATHERED_BYTES, newton_schulz_elements, shampoo_step_bytes
from stagewright.planner.documents.job import Optimizer
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.documents.profile import LayerClass
from stagewright.planner.tile_shards import OwnedTensor

_SUM_BYTES = 4.0  # of sums and products on processors, at least


@dataclass(frozen=True)
class SteppedTensor:
    """A tensor as one device holds it before ZeRO divides it.

    Parameters
    ----------
    size : elements on the device.
    rows, columns, count : of the matrices that are stepped as such, whole; 0 for any other tensor.
    """

    size: float
    rows: int = 0
    columns: int = 0
    count: int = 0

    @property
    def whole(self) -> float:
        """Return the elements of whole matrices."""
        return float(self.rows * self.columns * self.count)


@dataclass(frozen=True)
class SteppedBucket:
    """Tensors that are stepped together.

    Parameters
    ----------
    owned : elements of them that one device steps.
    num_shards : of the bucket; 1 where a device steps all.
    is_even : the shards are of one length.
    """

    tensors: tuple[SteppedTensor, ...]
    owned: float
    num_shards: int
    is_even: bool


def stepped_tensors(
    layer: LayerClass, degrees: Degrees, dense: float
) -> tuple[tuple[SteppedTensor, ...], tuple[SteppedTensor, ...]]:
    """Return a layer's tensors on one device, those of divided experts apart behind the others; none where they are not known.

    `dense` are the parameters without experts' that the device holds.
    """
    divided = degrees.expert_split
    share = dense / max(layer.parameters - layer.expert_parameters, 1)
    found: tuple[list[SteppedTensor], list[SteppedTensor]] = ([], [])
    for tensor in layer.tensors:
        parts, stack = 1.0 / divided, degrees.ep
        if not tensor.of_experts:
            parts, stack = share if layer.kind != "block" else 1.0 / degrees.tp if tensor.is_matrix else 1.0, 1
        size = tensor.num_elements * parts
        rows, columns = tensor.shape[-2:] if tensor.is_matrix else (0, 0)
        count = max(tensor.num_matrices // stack, 1) if tensor.is_matrix else 0
        found[tensor.of_experts and divided > 1].append(SteppedTensor(size, rows, columns, count))
    return tuple(found[0]), tuple(found[1])


def stepped_part(owned: OwnedTensor) -> SteppedTensor:
    """Return what a device steps of a tensor that is cut between bands of tiles, as matrices of its highest band."""
    if not owned.is_matrix:
        return SteppedTensor(owned.count)
    columns = owned.shape[-1]
    rows = max(height for height, _ in owned.tile_sizes)
    return SteppedTensor(owned.count, rows, columns, owned.count // (rows * columns))


def matrix_step_bytes(optimizer: Optimizer, buckets: Iterable[SteppedBucket], *, is_cpu: bool) -> float:
    """Return the most that stepping any of some buckets holds beside the states."""
    need = _muon_bytes if optimizer.name == "muon" else _shampoo_bytes
    return max((need(optimizer, bucket, is_cpu) for bucket in buckets), default=0.0)


def _shampoo_bytes(optimizer: Optimizer, bucket: SteppedBucket, is_cpu: bool) -> float:
    return max(
        (_preconditioned_bytes(optimizer, each, min(each.size, bucket.owned)) for each in bucket.tensors), default=0.0
    )


def _preconditioned_bytes(optimizer: Optimizer, tensor: SteppedTensor, owned: float) -> float:
    width, copies = optimizer.stepped_bytes, 1 + optimizer.has_masters
    tile = shampoo_step_bytes(tensor.rows, tensor.columns, width) if tensor.count else 0.0
    if tensor.whole <= tensor.size:
        return width * copies * owned + tile
    joined = tensor.whole * owned / tensor.size
    gathering = 2 * optimizer.gradient_bytes * joined
    turning = (optimizer.gradient_bytes + width) * joined + tile
    return width * owned + max(width * owned * (copies - 1), gathering, turning, width * (2 * joined + owned))


def _muon_bytes(optimizer: Optimizer, bucket: SteppedBucket, is_cpu: bool) -> float:
    narrow = _narrow_bytes(optimizer)
    if bucket.num_shards == 1:
        return max((_tensor_bytes(optimizer, each, each.size, is_cpu) for each in bucket.tensors), default=0.0)
    gathered = narrow * bucket.owned * bucket.num_shards
    largest = min(max((each.size for each in bucket.tensors), default=0.0), bucket.owned)
    made = narrow * bucket.owned + optimizer.stepped_bytes * optimizer.has_masters * largest
    coming = narrow * bucket.owned + gathered * (1 + (is_cpu and bucket.is_even))
    beside = [
        _tensor_bytes(optimizer, each, min(each.size, bucket.owned), is_cpu, is_there=True) for each in bucket.tensors
    ]
    return max(made, coming, gathered + max(beside, default=0.0))


def _tensor_bytes(
    optimizer: Optimizer, tensor: SteppedTensor, owned: float, is_cpu: bool, *, is_there: bool = False
) -> float:
    """Return what one tensor needs; with `is_there` beside the gathered momentum that it lies in."""
    narrow, width = _narrow_bytes(optimizer), optimizer.stepped_bytes
    is_copied = narrow < width and not is_there
    own = narrow * tensor.size if is_copied else 0.0
    widened = width * owned * optimizer.has_masters
    if not tensor.count:
        sums = _SUM_BYTES * tensor.size if is_cpu and narrow < _SUM_BYTES else 0.0
        return own + max(sums, widened)
    is_split = tensor.whole > tensor.size
    joining = own + 2 * narrow * tensor.whole if is_split else 0.0
    held = narrow * tensor.whole if is_copied or is_split else 0.0
    element_bytes = max(narrow, _SUM_BYTES) if is_cpu else narrow
    iterated = element_bytes * newton_schulz_elements(tensor.rows, tensor.columns, tensor.count)
    return max(own + (0.0 if is_there else widened), joining, held + iterated)


def _narrow_bytes(optimizer: Optimizer) -> float:
    return optimizer.parameter_bytes if optimizer.parameter_bytes > _SUM_BYTES else GATHERED_BYTES
