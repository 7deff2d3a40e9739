"""Which tensors lie in what an optimizer steps, and which of them are matrices of blocks, for optimizers that need whole matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewright.modeling.chain import LayerChain
from stagewright.modeling.tensor_collectives import TensorGroup
from stagewright.modeling.tensor_parallel import TensorShards
from stagewright.planner.cost.matrix_optimizer import BLOCK


@dataclass(frozen=True)
class TensorKinds:
    """What an optimizer of whole matrices needs of which parameters, by their ids.

    Parameters
    ----------
    matrices : matrices of blocks, several in a stack included.
    gathered : tensors of which the ranks of a group hold parts and each needs the whole.
    rows : tensors of which each rank of a group needs its own rows and the sum of all squares: a vocabulary's, and vectors of
        divided experts.
    """

    matrices: frozenset[int]
    gathered: frozenset[int] = frozenset()
    rows: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Piece:
    """Elements of one tensor that lie in a flat parameter.

    Parameters
    ----------
    shape : of the tensor.
    is_matrix : the tensor is a matrix of a block, or several in a stack.
    part : where the elements lie in the parameter.
    first : the first element of the tensor that is one of them.
    place : of the tensor among those of which the parameter holds elements; None where it is the only one.
    """

    shape: tuple[int, ...]
    is_matrix: bool
    part: slice
    first: int = 0
    place: int | None = None


@dataclass(frozen=True)
class Tile:
    """At most BLOCK x BLOCK neighbouring elements of a matrix, or of one in a stack: the `number`-th of the tensor's tiles.

    `rows` are those of all matrices of the stack, one under the other.
    """

    number: int
    rows: slice
    columns: slice


def tiles(shape: Sequence[int], first: int, count: int) -> Iterator[Tile]:
    """Yield those of a tensor's tiles that lie in `count` elements from `first` on, where bands of tiles begin and end."""
    height, width = shape[-2:]
    number = 0
    for top in range(0, math.prod(shape) // width, height):
        for upper in range(top, top + height, BLOCK):
            rows = slice(upper, min(upper + BLOCK, top + height))
            for left in range(0, width, BLOCK):
                if first <= rows.start * width < first + count:
                    yield Tile(number, rows, slice(left, min(left + BLOCK, width)))
                number += 1


def num_tiles(shape: Sequence[int]) -> int:
    """Return how many tiles a matrix has, or a stack of them."""
    height, width = shape[-2:]
    return math.prod(shape[:-2]) * -(-height // BLOCK) * -(-width // BLOCK)


def statistics_key(place: int | None, number: int) -> str:
    """Return how the names of a tile's statistics end: by the tensor's place among several, and the tile's number."""
    return f".{number}" if place is None else f"@{place}.{number}"


def nearest_band(shape: Sequence[int], element: int) -> int:
    """Return the element of a tensor nearest to another at which a band of tiles begins, or behind the last one."""
    height, width = shape[-2:]
    matrix, inside = divmod(element, height * width)
    below = inside // (BLOCK * width) * BLOCK * width
    above = min(below + BLOCK * width, height * width)
    return matrix * height * width + (below if inside - below <= above - inside else above)


@dataclass(frozen=True)
class Update:
    """Values for the elements of a flat parameter, each part made when it is asked for.

    Parameters
    ----------
    count, device, dtype : of all values together.
    make : returns the values of some elements.
    """

    count: int
    device: torch.device
    dtype: torch.dtype
    make: Callable[[slice], Tensor]

    def together(self, pieces: Iterable[Piece]) -> Tensor:
        """Return the values of all elements, made piece by piece; 0 where there is none."""
        values = torch.zeros(self.count, dtype=self.dtype, device=self.device)
        for piece in pieces:
            values[piece.part] = self.make(piece.part)
        return values


class Layout(Protocol):
    """Where the tensors of a parameter lie."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """Return the tensors' elements in the parameter, in order; what no piece covers is padding."""
        ...

    def gathered(self, update: Update) -> Iterator[tuple[int, Tensor]]:
        """Yield each piece's index and its whole tensor, flat, from values for all ranks' parts; a collective, to its end."""
        ...

    def own(self, index: int, whole: Tensor) -> Tensor:
        """Return what of a whole tensor, that of piece `index`, lies in the parameter, flat."""
        ...

    def mean_square(self, index: int, gathered: Tensor, dtype: torch.dtype) -> float:
        """Return the mean of the squares of a whole tensor, that of piece `index`, from what `gathered` has of it, in `dtype`."""
        ...


@dataclass(frozen=True)
class WholeLayout:
    """A parameter that is one whole tensor."""

    shape: tuple[int, ...]
    is_matrix: bool

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Return the one tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return (Piece(self.shape, self.is_matrix, slice(0, count)),)

    def gathered(self, update: Update) -> Iterator[tuple[int, Tensor]]:
        """Yield the values themselves."""
        yield 0, update.make(self.pieces[0].part)

    def own(self, index: int, whole: Tensor) -> Tensor:
        """Return all of it."""
        return whole.reshape(-1)

    def mean_square(self, index: int, gathered: Tensor, dtype: torch.dtype) -> float:
        """Return that of the tensor."""
        return mean_square(gathered, dtype)


@dataclass(frozen=True)
class SplitLayout:
    """A parameter that is a tensor-parallel rank's part of a tensor.

    Parameters
    ----------
    sent : told the bytes that this rank sends to gather the tensor.
    """

    parameter: nn.Parameter
    is_matrix: bool
    shards: TensorShards
    sent: Callable[[float], None]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Return the one tensor, by its whole shape."""
        shape = whole_shape(self.parameter, self.shards)
        return (Piece(shape, self.is_matrix, slice(0, self.parameter.numel())),)

    def gathered(self, update: Update) -> Iterator[tuple[int, Tensor]]:
        """Yield the tensor, from the parts of the tensor-parallel group."""
        part = update.make(self.pieces[0].part)
        yield 0, gathered_over_tensors(part, self.parameter, self.shards, self.sent)

    def own(self, index: int, whole: Tensor) -> Tensor:
        """Return this rank's part."""
        return self.shards.part(whole.view(self.pieces[0].shape), self.parameter).reshape(-1)

    def mean_square(self, index: int, gathered: Tensor, dtype: torch.dtype) -> float:
        """Return that of the whole tensor."""
        return mean_square(gathered, dtype)


@dataclass(frozen=True)
class RowsLayout:
    """A parameter that is a rank's rows of a tensor, of which no step needs the others: one sum goes over them.

    A vocabulary's, or vectors of experts.
    """

    parameter: nn.Parameter
    group: TensorGroup

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Return the rows."""
        return (Piece(tuple(self.parameter.shape), False, slice(0, self.parameter.numel())),)

    def gathered(self, update: Update) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows that are here."""
        yield 0, update.make(self.pieces[0].part)

    def own(self, index: int, whole: Tensor) -> Tensor:
        """Return all of them."""
        return whole.reshape(-1)

    def mean_square(self, index: int, gathered: Tensor, dtype: torch.dtype) -> float:
        """Return that of all ranks' rows; a collective."""
        return mean_square_of_rows(gathered, self.group, dtype)


def whole_shape(parameter: Tensor, shards: TensorShards) -> tuple[int, ...]:
    """Return the shape of a tensor of which this rank of the tensor-parallel group holds a part."""
    shape = list(parameter.shape)
    group = shards.group_of(parameter)
    assert group is not None
    shape[shards.dimensions[id(parameter)]] *= group.size // shards.num_copies(parameter)
    return tuple(shape)


def gathered_over_tensors(
    part: Tensor, parameter: Tensor, shards: TensorShards, sent: Callable[[float], None]
) -> Tensor:
    """Return a tensor whole and flat, from the parts of the tensor-parallel group; tells the bytes that this rank sends."""
    group = shards.group_of(parameter)
    assert group is not None
    sent((group.size - 1.0) * part.numel() * part.element_size())
    return shards.whole(part.view(parameter.shape), parameter).reshape(-1)


def mean_square_of_rows(rows: Tensor, group: TensorGroup, dtype: torch.dtype) -> float:
    """Return the mean of the squares of all ranks' rows, as many on each; a collective."""
    total = rows.new_tensor(mean_square(rows, dtype), dtype=dtype)
    dist.all_reduce(total, group=group.group)
    return float(total) / group.size


def mean_square(value: Tensor, dtype: torch.dtype) -> float:
    """Return the mean of the squares, summed in `dtype`."""
    return float(value.norm(dtype=dtype)) ** 2 / value.numel()


LayoutOf = Callable[[nn.Parameter], Layout]


def vocabulary_parameters(chain: LayerChain) -> frozenset[int]:
    """Return the ids of the parameters of embeddings and heads."""
    named = dict(chain.model.named_parameters(remove_duplicate=False))
    ends = [layer for layer in chain.layers if layer.kind in ("embedding", "head")]
    return frozenset(id(named[name]) for layer in ends for name in layer.parameters if name in named)


def whole_layouts(matrices: Collection[int]) -> LayoutOf:
    """Return the layouts of parameters that are whole tensors, given the ids of those that are matrices of blocks."""
    return lambda parameter: WholeLayout(tuple(parameter.shape), id(parameter) in matrices)
