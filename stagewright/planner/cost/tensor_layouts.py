"""Matrix products split over a grid of devices: what each device receives, keeps and waits for.

One product C = A B with A of m x k (m = b s rows), B of k x n, on p devices; elements received by one device:

    1-D       p        2 (p-1)/p m n for each pair of a column- and a row-split product (Shoeybi et al. 2019)
    2-D       q x q    (q-1)/q^2 (m k + k n)                            SUMMA; Optimus, Xu et al. 2021
    2.5-D     q x q x d    (q-1) (m k / (q^2 d) + k n / q^2)            Tesseract, Wang et al. 2021
    3-D       q^3      (q-1)/q^3 (m k + k n + m n)                      Agarwal et al. 1995; Bian et al. 2021

2.5-D with d = 1 is 2-D. Activations are split by p in all but 1-D, where every device holds m x h rows. Time is the sum of
the broadcasts, gathers and reductions along the grid's axes on their links; the product's compute is m k n / p in all.
The formulas count received elements, so for 1-D an all-reduce counts both halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isqrt

from stagewright.planner.cost.communication import collective_s
from stagewright.planner.cost.groups import GroupShape, strided_group
from stagewright.planner.documents.cluster import NodeGroup
from stagewright.planner.errors import InvalidArgument


class GridKind(StrEnum):
    """How the devices of a tensor-parallel group are arranged."""

    ONE_D = "1d"
    TWO_D = "2d"
    TWO_AND_HALF_D = "2.5d"
    THREE_D = "3d"


@dataclass(frozen=True)
class Product:
    """C = A B: `rows` x `inner` times `inner` x `columns`."""

    rows: float
    inner: float
    columns: float

    @property
    def left(self) -> float:
        """Elements of A."""
        return self.rows * self.inner

    @property
    def right(self) -> float:
        """Elements of B."""
        return self.inner * self.columns

    @property
    def output(self) -> float:
        """Elements of C."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Grid:
    """An arrangement of p devices: q x q x depth; q = p and depth 1 for 1-D."""

    kind: GridKind
    side: int
    depth: int = 1

    @property
    def num_devices(self) -> int:
        match self.kind:
            case GridKind.ONE_D:
                return self.side
            case GridKind.THREE_D:
                return self.side**3
            case _:
                return self.side**2 * self.depth

    def received_elements(self, product: Product) -> float:
        """Return the elements one device receives in the forward of one product; for 1-D of one row-split product."""
        q = self.side
        match self.kind:
            case GridKind.ONE_D:
                return 2 * (q - 1) / q * product.output
            case GridKind.THREE_D:
                return (q - 1) / q**3 * (product.left + product.right + product.output)
            case _:
                return (q - 1) * (product.left / (q**2 * self.depth) + product.right / q**2)

    def activation_elements(self, elements: float) -> float:
        """Return what one device keeps of an activation of so many elements."""
        return elements if self.kind is GridKind.ONE_D else elements / self.num_devices

    def weight_elements(self, elements: float) -> float:
        """Return what one device holds of a weight; 2.5-D replicates it over the depth."""
        return elements / (self.side**2 if self.kind is GridKind.TWO_AND_HALF_D else self.num_devices)

    def product_s(self, product: Product, group: NodeGroup, *, element_bytes: float = 2.0) -> float:
        """Return the communication seconds of one product's forward on adjacent devices of a node group.

        Grid rows are adjacent devices, columns are at distance q, the third axis at distance q^2.
        """
        q, bytes_each = self.side, element_bytes
        row, column = strided_group(q, 1, group), strided_group(q, q, group)
        match self.kind:
            case GridKind.ONE_D:
                return collective_s("all-reduce", product.output * bytes_each, row)
            case GridKind.THREE_D:
                third = strided_group(q, q * q, group)
                share = bytes_each / q**2
                return (
                    collective_s("all-gather", product.left * share, row)
                    + collective_s("all-gather", product.right * share, column)
                    + collective_s("reduce-scatter", product.output * share, third)
                )
            case _:
                left_block = product.left / (q**2 * self.depth) * bytes_each
                right_block = product.right / q**2 * bytes_each
                return summa_s(left_block, right_block, q, row, column)


def summa_s(left_block_bytes: float, right_block_bytes: float, q: int, row: GroupShape, column: GroupShape) -> float:
    """Return the seconds of SUMMA's q steps: in each, one block of A goes along the rows, one of B along the columns.

    Rows and columns work at the same time where they use different links; here they are taken one after the other.
    """
    step_s = collective_s("broadcast", left_block_bytes, row) + collective_s("broadcast", right_block_bytes, column)
    return q * step_s


def grids(num_devices: int) -> list[Grid]:
    """Return every grid of exactly `num_devices`, 1-D first."""
    found = [Grid(GridKind.ONE_D, num_devices)]
    for q in range(2, isqrt(num_devices) + 1):
        depth, rest = divmod(num_devices, q * q)
        if rest == 0 and depth == 1:
            found.append(Grid(GridKind.TWO_D, q))
        elif rest == 0 and depth <= q:
            found.append(Grid(GridKind.TWO_AND_HALF_D, q, depth))
        if q**3 == num_devices:
            found.append(Grid(GridKind.THREE_D, q))
    return found


def least_traffic_grid(products: Sequence[Product], num_devices: int) -> Grid:
    """Return the grid whose devices receive the fewest elements over a chain of products, 1-D when it ties.

    1-D pairs a column-split with a row-split product, so only every second product of a chain communicates.
    """
    return min(grids(num_devices), key=lambda grid: (chain_elements(products, grid), grid.kind is not GridKind.ONE_D))


def chain_elements(products: Sequence[Product], grid: Grid) -> float:
    """Return the elements one device receives in the forward of a chain of products."""
    counted = products[1::2] if grid.kind is GridKind.ONE_D else products
    return sum(grid.received_elements(product) for product in counted)


def fastest_grid(
    products: Sequence[Product], num_devices: int, group: NodeGroup, *, element_bytes: float = 2.0
) -> Grid:
    """Return the grid with the shortest communication over a chain of products on the links of a node group."""
    if num_devices > group.num_devices:
        raise InvalidArgument(
            f"a grid of {num_devices} devices needs more than the group's {group.num_devices}", field="tp"
        )

    def seconds(grid: Grid) -> float:
        counted = products[1::2] if grid.kind is GridKind.ONE_D else products
        return sum(grid.product_s(product, group, element_bytes=element_bytes) for product in counted)

    return min(grids(num_devices), key=lambda grid: (seconds(grid), grid.kind is not GridKind.ONE_D))


def transformer_products(
    *, tokens: float, hidden: float, ffn: float, kv_features: float | None = None
) -> list[Product]:
    """Return the four products of a transformer layer in the order of their pairs: (qkv, output), (up, down)."""
    features = hidden + (2 * hidden if kv_features is None else kv_features)
    return [
        Product(tokens, hidden, features),
        Product(tokens, hidden, hidden),
        Product(tokens, hidden, ffn),
        Product(tokens, ffn, hidden),
    ]


def exposed_decomposed_s(communication_s: float, product_s: float, chunks: int) -> float:
    """Return what remains visible of a collective cut into `chunks` and run beside the product's chunks.

    Async tensor parallelism, Flux, CoCoNet, Domino: max(0, comm - product (1 - 1/r)), never less than one chunk of the
    communication, which nothing hides.
    """
    if chunks < 1:
        raise InvalidArgument(f"chunks is {chunks}, it must be at least 1", field="chunks")
    return max(communication_s / chunks, communication_s - product_s * (1 - 1 / chunks))


def vocabulary_pipeline_load(
    layer_s: float, num_layers: int, vocabulary_s: float, num_ranks: int
) -> tuple[float, float]:
    """Return the busiest rank's seconds with the vocabulary layers on the last rank, and spread over all ranks.

    Vocabulary parallelism in the pipeline (Yeung et al. 2024) shards embedding and head over the pipeline ranks.
    """
    share = num_layers / num_ranks
    return share * layer_s + vocabulary_s, share * layer_s + vocabulary_s / num_ranks
