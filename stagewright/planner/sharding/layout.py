"""Layouts: how a tensor lies on a device mesh, one placement for each mesh axis.

On an axis of n devices a tensor is split along one of its dimensions, replicated, or partial (every device holds a
summand). This is OneFlow's SBP (Yuan et al., 2021) and the placement list of PyTorch's DTensor; Mesh-TensorFlow (Shazeer et
al., NeurIPS 2018) and GSPMD (Xu et al., 2021) know the first two. Dimensions have names. A dimension that several axes
split is cut by the earlier axis first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from stagewright.planner.errors import InvalidArgument


@dataclass(frozen=True, order=True)
class Placement:
    """What an axis does to a tensor; `dim` names the dimension when it is split."""

    kind: Literal["split", "replicated", "partial"]
    dim: str = ""

    def __str__(self) -> str:
        return {"split": f"S({self.dim})", "replicated": "R", "partial": "P"}[self.kind]


REPLICATED = Placement("replicated")
PARTIAL = Placement("partial")

Layout = tuple[Placement, ...]


def split(dim: str) -> Placement:
    """Return the placement that splits a dimension."""
    return Placement("split", dim)


def text(layout: Layout) -> str:
    """Return a layout as people write it: `[S(b), R]`."""
    return "[" + ", ".join(map(str, layout)) + "]"


@dataclass(frozen=True)
class Mesh:
    """A grid of devices: axis names and sizes, the outermost first.

    Raises
    ------
    InvalidArgument : for an axis without devices or two axes of one name.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.sizes) or len(set(self.axes)) != len(self.axes):
            raise InvalidArgument(
                f"mesh axes {self.axes} and sizes {self.sizes} do not pair up", field="mesh", hint="name each axis once"
            )
        for axis, size in zip(self.axes, self.sizes, strict=True):
            if size < 1:
                raise InvalidArgument(f"mesh axis {axis} has {size} devices", field="mesh", hint="give at least 1")

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Mesh:
        """Return the mesh of named sizes, in their order."""
        return cls(tuple(sizes), tuple(sizes.values()))

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes)

    @property
    def replicated(self) -> Layout:
        """The layout that copies a tensor to every device."""
        return (REPLICATED,) * len(self.axes)

    def layout(self, placements: Mapping[str, Placement]) -> Layout:
        """Return the layout with some axes' placements, the others replicated; raises InvalidArgument on other names."""
        unknown = sorted(set(placements) - set(self.axes))
        if unknown:
            raise InvalidArgument(
                f"mesh has no axis {unknown[0]!r}", field="layout", hint="known: " + ", ".join(self.axes)
            )
        return tuple(placements.get(axis, REPLICATED) for axis in self.axes)


def num_shards(mesh: Mesh, layout: Layout, dim: str | None = None) -> int:
    """Return into how many parts a layout cuts a dimension, or the whole tensor."""
    return math.prod(
        size
        for size, placement in zip(mesh.sizes, layout, strict=True)
        if placement.kind == "split" and dim in (None, placement.dim)
    )


def fits(mesh: Mesh, layout: Layout, dims: Iterable[str], sizes: Mapping[str, int]) -> bool:
    """Tell whether the layout splits only dimensions the tensor has, and evenly."""
    known = set(dims)
    splits = {placement.dim for placement in layout if placement.kind == "split"}
    return splits <= known and all(sizes[dim] % num_shards(mesh, layout, dim) == 0 for dim in splits)
