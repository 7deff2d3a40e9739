"""Which tensors lie in what an optimizer steps, and which of them are matrices of blocks, for optimizers that need whole matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewright.modeling.chain import LayerChain
from stagewright.modeling.tensor_collectives import TensorGroup
from stagewright.modeling.tensor_parallel import InnerSplit, TensorShards
from stagewright.planner.matrix_tiles import Tile, tiles


@dataclass(frozen=True)
class TensorKinds:
    """What an optimizer of whole matrices needs of which parameters, by their ids.

    Parameters
    ----------
    matrices : matrices of blocks, several in a stack included.
    gathered : tensors of which the ranks of a group hold parts and the whole is needed, each with its number.
    rows : tensors of which each rank of a group needs its own rows and the sum of all squares: a vocabulary's, and vectors of
        divided experts.
    """

    matrices: frozenset[int]
    gathered: Mapping[int, int] = field(default_factory=dict)
    rows: frozenset[int] = frozenset()

    def split_of(self, parameter: Tensor, shards: TensorShards) -> SplitTensor | None:
        """Return how a group splits a tensor that is needed whole; None for any other."""
        split = shards.tensor_split(parameter) if id(parameter) in self.gathered else None
        return None if split is None else SplitTensor(tuple(parameter.shape), split, self.gathered[id(parameter)])


@dataclass(frozen=True)
class SplitTensor:
    """A tensor that a group holds in parts, and who of the group keeps the statistics of which of its tiles.

    Tiles are dealt out one after the other, those of the next tensor from the next rank on.

    Parameters
    ----------
    shape : of this rank's part.
    number : of the tensor among those that are split.
    """

    shape: tuple[int, ...]
    split: InnerSplit
    number: int

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return self.split.whole_shape(self.shape)

    @property
    def splits_rows(self) -> bool:
        """Whether a part has some rows of each matrix, and not some columns of all rows."""
        return self.split.dimension == len(self.shape) - 2

    def keeps(self, tile: int) -> bool:
        """Whether this rank keeps the statistics of a tile, given its number in the tensor."""
        return (self.number + tile) % self.split.group.size == self.split.group.index

    def whole(self, part: Tensor) -> Tensor:
        """Return the tensor, flat, from the parts of the group; a collective."""
        self._count("all-gather", part)
        return self.split.whole(part.view(self.shape)).reshape(-1)

    def part(self, whole: Tensor) -> Tensor:
        """Return this rank's part of the tensor, flat."""
        return self.split.part(whole.view(self.whole_shape)).reshape(-1)

    def joined(self, part: Tensor) -> Tensor:
        """Return rows of the tensor's matrices, [rows, columns], from what the group has of them, flat; a collective.

        What is split by rows must be whole matrices.
        """
        self._count("all-gather", part)
        return self._along.whole(self._shaped(part)).reshape(-1, self.whole_shape[-1])

    def placed(self, part: Tensor) -> Tensor:
        """Return such rows with this rank's part of them, zeros elsewhere."""
        local = self._shaped(part)
        shape = self._along.whole_shape(local.shape)
        rows = part.new_zeros(shape)
        views = self._along.views(rows, self.split.group.index)
        for view, own in zip(views, self._along.pieces(local), strict=True):
            view.copy_(own)
        return rows.view(-1, shape[-1])

    def scattered(self, rows: Tensor) -> Tensor:
        """Return this rank's part of the sum of such rows over the group, flat; a collective."""
        group, along = self.split.group, self._along
        columns = self.whole_shape[-1]
        shaped = rows.view(-1, self.whole_shape[-2], columns) if self.splits_rows else rows.view(1, -1, columns)
        parts = [torch.cat(along.views(shaped, index), dim=along.dimension) for index in range(group.size)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=group.group)
        self._count("reduce-scatter", own)
        return own.reshape(-1)

    @property
    def _along(self) -> InnerSplit:
        """Return the split of what `_shaped` gives."""
        return InnerSplit(1 if self.splits_rows else 2, self.split.parts, self.split.group, self.split.copies)

    def _shaped(self, part: Tensor) -> Tensor:
        """Return rows of this rank's part, [matrices, rows, columns] or [1, rows, columns]."""
        if self.splits_rows:
            return part.view(-1, *self.shape[-2:])
        return part.view(1, -1, self.shape[-1])

    def _count(self, operation: str, part: Tensor) -> None:
        group = self.split.group
        name = f"{operation}/update-{group.purpose}"
        sent = (group.size - 1.0) * part.numel() * part.element_size()
        group.traffic[name] = group.traffic.get(name, 0.0) + sent


@dataclass(frozen=True)
class Piece:
    """Elements of one tensor that lie in a flat parameter.

    Parameters
    ----------
    shape : of the tensor.
    is_matrix : the tensor is a matrix of a block, or several in a stack.
    part : where the elements lie in the parameter.
    first : the first element of the tensor that is one of them; where a group splits it, of this rank's part.
    place : of the tensor among those of which the parameter holds elements; None where it is the only one.
    split : how a group splits the tensor, where it is needed whole.
    """

    shape: tuple[int, ...]
    is_matrix: bool
    part: slice
    first: int = 0
    place: int | None = None
    split: SplitTensor | None = None

    def tiles(self) -> Iterator[Tile]:
        """Yield those of the tensor's tiles that lie in the elements, of all ranks of a group that splits it."""
        factor = 1 if self.split is None else self.split.split.factor
        return tiles(self.shape, factor * self.first, factor * (self.part.stop - self.part.start))

    def kept(self) -> frozenset[int]:
        """Return the numbers of those tiles of which this rank keeps the statistics."""
        return frozenset(tile.number for tile in self.tiles() if self.split is None or self.split.keeps(tile.number))

    @property
    def first_row(self) -> int:
        """Return the row of the tensor's matrices, one under the other, at which the elements begin."""
        factor = 1 if self.split is None else self.split.split.factor
        return factor * self.first // self.shape[-1]


def statistics_key(place: int | None, number: int) -> str:
    """Return how the names of a tile's statistics end: by the tensor's place among several, and the tile's number."""
    return f".{number}" if place is None else f"@{place}.{number}"


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
    """A parameter that is one rank's part of a tensor that a group splits."""

    tensor: SplitTensor
    is_matrix: bool

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Return the one tensor, by its whole shape."""
        part = slice(0, math.prod(self.tensor.shape))
        return (Piece(self.tensor.whole_shape, self.is_matrix, part, split=self.tensor),)

    def gathered(self, update: Update) -> Iterator[tuple[int, Tensor]]:
        """Yield the tensor, from the parts of the group."""
        yield 0, self.tensor.whole(update.make(self.pieces[0].part))

    def own(self, index: int, whole: Tensor) -> Tensor:
        """Return this rank's part."""
        return self.tensor.part(whole)

    def mean_square(self, index: int, gathered: Tensor, dtype: torch.dtype) -> float:
        """Return that of the whole tensor."""
        return mean_square(gathered, dtype)


@dataclass(frozen=True)
class RowsLayout:
    """A parameter that is a rank's rows of a tensor, of which no step needs the others: one sum goes over them.

    A vocabulary's, or vectors of experts, which two groups may divide.
    """

    parameter: nn.Parameter
    groups: Sequence[TensorGroup]

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
        return mean_square_of_rows(gathered, self.groups, dtype)


def mean_square_of_rows(rows: Tensor, groups: Sequence[TensorGroup], dtype: torch.dtype) -> float:
    """Return the mean of the squares of all rows that the ranks of some groups have, as many on each; a collective."""
    total = rows.new_tensor(mean_square(rows, dtype), dtype=dtype)
    for group in groups:
        dist.all_reduce(total, group=group.group)
    return float(total) / math.prod(group.size for group in groups)


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
