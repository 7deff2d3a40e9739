"""Matrix products on grids of emulated devices: SUMMA (2-D and 2.5-D) and the three-axis product.

    SUMMA     for step in 0..q-1: the owner of A[i, step] sends it along row i, the owner of B[step, j] along column j,
              and device (i, j) adds A[i, step] B[step, j]          van de Geijn and Watts 1997
    2.5-D     rows of A are dealt to d layers, each layer holds a copy of B and runs SUMMA
    3-D       device (i, j, l) gathers A[i, l] over j and B[l, j] over i, multiplies, and C[i, j] is summed over l

Received elements equal tensor_layouts' formulas exactly.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.cost.emulation.wire import Array, Wire


def summa(left: Array, right: Array, q: int) -> tuple[Array, Wire]:
    """Return A B computed on a q x q grid, and what each device received; sizes must divide by q."""
    wire = Wire(q * q)
    a, b = _blocks(left, q, q), _blocks(right, q, q)
    output = [[np.zeros((a[0][0].shape[0], b[0][0].shape[1])) for _ in range(q)] for _ in range(q)]
    for step in range(q):
        for i in range(q):
            for j in range(q):
                here = i * q + j
                panel = wire.send(a[i][step], i * q + step, here)
                other = wire.send(b[step][j], step * q + j, here)
                output[i][j] += panel @ other
    return np.block(output), wire


def layered_summa(left: Array, right: Array, q: int, depth: int) -> tuple[Array, Wire]:
    """Return A B on a q x q x depth grid, B replicated over the depth (2.5-D)."""
    wire = Wire(q * q * depth)
    parts = []
    for layer, rows in enumerate(np.split(left, depth)):
        part, inner = summa(rows, right, q)
        parts.append(part)
        for device, count in enumerate(inner.received):
            wire.received[layer * q * q + device] += count
    return np.concatenate(parts), wire


def three_axis(left: Array, right: Array, q: int) -> tuple[Array, Wire]:
    """Return A B on q^3 devices: gathers of A and B along two axes, a reduce-scatter of C along the third."""
    wire = Wire(q**3)

    def device(i: int, j: int, k: int) -> int:
        return (i * q + j) * q + k

    a, b = _blocks(left, q, q), _blocks(right, q, q)
    rows, columns = a[0][0].shape[0], b[0][0].shape[1]
    output = [[np.zeros((rows, columns)) for _ in range(q)] for _ in range(q)]
    for i in range(q):
        for j in range(q):
            partial = []
            for k in range(q):
                here = device(i, j, k)
                # Shards of A[i, k] lie on the devices of axis j, shards of B[k, j] on those of axis i.
                panel = np.concatenate(
                    [wire.send(part, device(i, other, k), here) for other, part in enumerate(np.split(a[i][k], q))]
                )
                weight = np.concatenate(
                    [wire.send(part, device(other, j, k), here) for other, part in enumerate(np.split(b[k][j], q))]
                )
                partial.append(panel @ weight)
            for k in range(q):
                shards = [
                    wire.send(np.split(block, q)[k], device(i, j, other), device(i, j, k))
                    for other, block in enumerate(partial)
                ]
                rows_of = slice(k * rows // q, (k + 1) * rows // q)
                output[i][j][rows_of] = np.sum(shards, axis=0)
    return np.block(output), wire


def _blocks(matrix: Array, rows: int, columns: int) -> list[list[Array]]:
    return [list(np.split(part, columns, axis=1)) for part in np.split(matrix, rows)]
