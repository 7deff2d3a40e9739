"""Aceso's profile folder: one CSV of operators for each microbatch, tensor degree and algorithm, and CSVs of collectives.

Files are named `<model>_mbs<M>_tp<T>_algo<A>.csv` and `prim_<model>_<collective>_<n>gpus.csv`; times are microseconds
(operators) and milliseconds (collectives), sizes mebibytes, point-to-point bandwidth GB/s by message MiB. The operators
of one transformer block stand once; the model repeats them.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Literal

from stagewright.planner.documents import (
    Cluster,
    ConfigurationCost,
    Device,
    LayerClass,
    LayerRun,
    LinkLevel,
    LinkSegment,
    ModelProfile,
    NodeGroup,
    Pedigree,
    Recompute,
    Source,
)
from stagewright.planner.errors import InvalidDocument

MIB = 2.0**20
PARAMETER_BYTES = 2
COLUMNS = (
    "op_name",
    "forward-compute",
    "backward-compute",
    "input_size",
    "output_size",
    "weights",
    "activations",
    "fwd_reserved",
    "bwd_reserved",
)
_OPERATORS = re.compile(r"^(?P<model>.+)_mbs(?P<microbatch>\d+)_tp(?P<tensor>\d+)_algo(?P<algorithm>\d+)\.csv$")
_COLLECTIVE = re.compile(
    r"^prim_(?P<model>.+?)_(?P<operation>all_gather|all_reduce|all_to_all|reduce_scatter)_(?P<ranks>\d+)gpus\.csv$"
)
_LINK = "p2p_intra_node.csv"


@dataclass(frozen=True)
class AcesoOperator:
    """One row: microseconds and mebibytes of one shard."""

    name: str
    forward_us: float
    backward_us: float
    input_mib: float
    output_mib: float
    weights_mib: float
    activations_mib: float
    forward_reserved_mib: float
    backward_reserved_mib: float


@dataclass(frozen=True)
class AcesoFolder:
    """All tables of one model.

    Parameters
    ----------
    operators : rows by (microbatch, tensor degree, algorithm).
    collectives : milliseconds by mebibytes, by (operation, ranks).
    bandwidth : point-to-point GB/s by message mebibytes.
    """

    model: str
    operators: Mapping[tuple[int, int, int], tuple[AcesoOperator, ...]]
    collectives: Mapping[tuple[str, int], Mapping[float, float]]
    bandwidth: Mapping[float, float]


def read_aceso_folder(folder: Path | str, model: str) -> AcesoFolder:
    """Return the tables of `model`; raises InvalidDocument with file, line and column."""
    path = Path(folder)
    operators: dict[tuple[int, int, int], tuple[AcesoOperator, ...]] = {}
    collectives: dict[tuple[str, int], Mapping[float, float]] = {}
    models: set[str] = set()
    for file in sorted(path.glob("*.csv")):
        if match := _COLLECTIVE.match(file.name):
            if match["model"] == model:
                collectives[match["operation"], int(match["ranks"])] = parse_pairs(_text(file), source=file.name)
        elif match := _OPERATORS.match(file.name):
            models.add(match["model"])
            if match["model"] == model:
                key = (int(match["microbatch"]), int(match["tensor"]), int(match["algorithm"]))
                operators[key] = parse_operators(_text(file), source=file.name)
    if not operators:
        raise InvalidDocument(
            f"{path}: holds no tables of {model!r}", field="model", hint="it holds " + ", ".join(sorted(models))
        )
    names = {tuple(row.name for row in rows) for rows in operators.values()}
    if len(names) > 1:
        raise InvalidDocument(f"{path}: the tables of {model!r} list different operators", field="op_name")
    link = path / _LINK
    bandwidth = parse_columns(_text(link), source=link.name) if link.exists() else {}
    return AcesoFolder(model, operators, collectives, bandwidth)


def parse_operators(text: str, *, source: str) -> tuple[AcesoOperator, ...]:
    """Return the rows of an operator table."""
    reader = csv.reader(io.StringIO(text))
    header = tuple(next(reader, ()))
    if header != COLUMNS:
        raise InvalidDocument(
            f"{source}:1: columns are {', '.join(header)}; wanted {', '.join(COLUMNS)}", field="columns"
        )
    rows = []
    for line, cells in enumerate(reader, start=2):
        if len(cells) != len(COLUMNS):
            raise InvalidDocument(
                f"{source}:{line}: {len(cells)} values, {len(COLUMNS)} columns", field="line", hint="is it cut off?"
            )
        rows.append(
            AcesoOperator(
                cells[0],
                *(
                    _number(cell, f"{source}:{line}", column)
                    for cell, column in zip(cells[1:], COLUMNS[1:], strict=True)
                ),
            )
        )
    return tuple(rows)


def operators_text(rows: Sequence[AcesoOperator]) -> str:
    """Return the CSV of an operator table."""
    lines = [",".join(COLUMNS)]
    for row in rows:
        values = (
            row.forward_us,
            row.backward_us,
            row.input_mib,
            row.output_mib,
            row.weights_mib,
            row.activations_mib,
            row.forward_reserved_mib,
            row.backward_reserved_mib,
        )
        lines.append(",".join([row.name, *(f"{value:.3f}" for value in values)]))
    return "\n".join(lines) + "\n"


def parse_pairs(text: str, *, source: str) -> dict[float, float]:
    """Return a two-column table, sorted by its first column."""
    reader = csv.reader(io.StringIO(text))
    next(reader, None)
    pairs = {}
    for line, cells in enumerate(reader, start=2):
        if len(cells) != 2:
            raise InvalidDocument(f"{source}:{line}: {len(cells)} values, 2 columns", field="line")
        pairs[_number(cells[0], f"{source}:{line}", "data_size")] = _number(cells[1], f"{source}:{line}", "time")
    return dict(sorted(pairs.items()))


def parse_columns(text: str, *, source: str) -> dict[float, float]:
    """Return a table of one row under its header of sizes."""
    rows = list(csv.reader(io.StringIO(text)))
    if len(rows) != 2 or len(rows[0]) != len(rows[1]):
        raise InvalidDocument(f"{source}: wanted one row of sizes and one of bandwidths", field="line")
    return {
        _number(size, f"{source}:1", "size"): _number(rate, f"{source}:2", "bandwidth")
        for size, rate in zip(*rows, strict=True)
    }


def repeated_operators(names: Sequence[str], num_blocks: int) -> list[tuple[str, str]]:
    """Return (layer name, operator) in model order, with each block's operators repeated `num_blocks` times.

    A block is a run of operators called `enc-...` or `dec-...`, final norms apart. A folder whose operators already
    stand once each for the whole model (a ResNet) has no such run and is left alone.
    """
    layers: list[tuple[str, str]] = []
    for block, run in groupby(names, key=_block_of):
        operators = list(run)
        if block is None:
            layers += [(name, name) for name in operators]
        else:
            layers += [(f"{block}.{number}.{name}", name) for number in range(num_blocks) for name in operators]
    return layers


def _block_of(name: str) -> str | None:
    return name[:3] if name.startswith(("enc-", "dec-")) and not name.endswith("final-layernorm") else None


def profile_from_aceso(
    folder: AcesoFolder,
    *,
    num_blocks: int,
    sequence_length: int,
    grain: Literal["operator", "sublayer", "block"] = "operator",
) -> ModelProfile:
    """Return the profile: each operator a layer, the faster algorithm of each configuration.

    The folder has one backward time; an operator with weights gets half of it for each gradient, marked analytic.
    With a coarser `grain` each block, or each half of it that starts with a layer norm, is one layer with one algorithm
    for all its operators, so that nothing is redistributed inside, and with two levels of recomputation: full keeps the
    layer's input, selective drops the run of operators without weights that saves most (the attention core) and keeps
    that run's input.
    """
    if grain != "operator":
        return _grouped_profile(folder, num_blocks, sequence_length, halves=grain == "sublayer")
    first = next(iter(folder.operators.values()))
    layers = repeated_operators([row.name for row in first], num_blocks)
    return ModelProfile(
        name=folder.model,
        dtype="fp16",
        layers=tuple(LayerRun(name=name, layer_class=operator) for name, operator in layers),
        classes={row.name: _layer_class(folder, index, sequence_length) for index, row in enumerate(first)},
        pedigree=Pedigree(warnings=tuple(unit_warnings(folder))),
    )


def _grouped_profile(folder: AcesoFolder, num_blocks: int, sequence_length: int, *, halves: bool) -> ModelProfile:
    names = [row.name for row in next(iter(folder.operators.values()))]
    layers: list[LayerRun] = []
    classes: dict[str, LayerClass] = {}
    for block, run in groupby(range(len(names)), key=lambda index: _block_of(names[index])):
        members = list(run)
        parts = [[index] for index in members]
        if block is not None:
            starts = [members[0], *(index for index in members[1:] if halves and names[index].endswith("layernorm"))]
            parts = [list(range(a, b)) for a, b in pairwise([*starts, members[-1] + 1])]
        for part in parts:
            classes[names[part[0]]] = _group_class(folder, part, sequence_length, is_block=block is not None)
        if len(parts) == 1 and block is not None:
            layers.append(LayerRun(name=f"{block}.{{}}", layer_class=names[members[0]], count=num_blocks))
        else:
            copies = num_blocks if block is not None else 1
            layers += [
                LayerRun(
                    name=f"{block}.{copy}.{names[part[0]]}" if block else names[part[0]], layer_class=names[part[0]]
                )
                for copy in range(copies)
                for part in parts
            ]
    return ModelProfile(
        name=folder.model,
        dtype="fp16",
        layers=tuple(layers),
        classes=classes,
        pedigree=Pedigree(warnings=tuple(unit_warnings(folder))),
    )


def _group_class(folder: AcesoFolder, members: Sequence[int], sequence_length: int, *, is_block: bool) -> LayerClass:
    best: dict[tuple[int, int], list[AcesoOperator]] = {}
    for (microbatch, tensor, _), rows in sorted(folder.operators.items()):
        chosen = [rows[index] for index in members]
        known = best.get((microbatch, tensor))
        if known is None or _total_us(chosen) < _total_us(known):
            best[microbatch, tensor] = chosen
    unsharded = best[min(best, key=lambda key: (key[1], key[0]))]
    return LayerClass(
        kind="block" if is_block else "other",
        parameters=round(sum(row.weights_mib for row in unsharded) * MIB / PARAMETER_BYTES),
        costs=tuple(
            _group_cost(rows, microbatch, tensor, sequence_length)
            for (microbatch, tensor), rows in sorted(best.items())
        ),
    )


def _total_us(rows: Sequence[AcesoOperator]) -> float:
    return _forward_us(rows) + sum(row.backward_us for row in rows)


def _group_cost(rows: Sequence[AcesoOperator], microbatch: int, tensor: int, sequence_length: int) -> ConfigurationCost:
    forward_s = _forward_us(rows) * 1e-6
    backward_s = sum(row.backward_us for row in rows) * 1e-6
    weight_grad_s = 0.5e-6 * sum(row.backward_us for row in rows if row.weights_mib)
    kept = sum(row.activations_mib for row in rows)
    dropped = _weightless_run(rows)
    levels = {
        Recompute.NONE: kept,
        Recompute.SELECTIVE: kept - _saved_mib(dropped),
        Recompute.FULL: min(kept, rows[0].input_mib),
    }
    return ConfigurationCost(
        microbatch=microbatch,
        sequence_length=sequence_length,
        tensor_degree=tensor,
        forward_s=forward_s,
        input_grad_s=backward_s - weight_grad_s,
        weight_grad_s=weight_grad_s,
        recompute_s={
            Recompute.SELECTIVE: _forward_us(dropped) * 1e-6,
            Recompute.FULL: forward_s,
        },
        activation_bytes={level: size * MIB for level, size in levels.items()},
        workspace_bytes=max(max(row.forward_reserved_mib, row.backward_reserved_mib) for row in rows) * MIB,
        output_bytes=rows[-1].output_mib * MIB,
        source=Source.MEASURED,
        sources={"input_grad_s": Source.ANALYTIC, "weight_grad_s": Source.ANALYTIC} if weight_grad_s else {},
    )


def _weightless_run(rows: Sequence[AcesoOperator]) -> list[AcesoOperator]:
    """Return the run of operators without weights whose activations, less the run's input, are largest; or nothing.

    Operators at its end that free less for each second of forward than half of the run do are kept: their outputs are
    cheap to hold (the context product behind the attention's dropout).
    """
    best: list[AcesoOperator] = []
    for weightless, run in groupby(rows, key=lambda row: row.weights_mib == 0):
        members = list(run)
        if weightless and _saved_mib(members) > _saved_mib(best):
            best = members
    while len(best) > 1 and best[-1].activations_mib / best[-1].forward_us < 0.5 * _saved_mib(best) / _forward_us(best):
        best = best[:-1]
    return best


def _saved_mib(run: Sequence[AcesoOperator]) -> float:
    return sum(row.activations_mib for row in run) - run[0].input_mib if run else 0.0


def _forward_us(rows: Sequence[AcesoOperator]) -> float:
    return sum(row.forward_us for row in rows)


def unit_warnings(folder: AcesoFolder) -> list[str]:
    """Return what looks like a wrong unit: microseconds against milliseconds, GB/s against MB/s."""
    warnings = []
    for key, rows in folder.operators.items():
        total_us = sum(row.forward_us + row.backward_us for row in rows)
        if 0 < total_us < 50 or total_us > 1e9:
            warnings.append(
                f"microbatch {key[0]}, tensor degree {key[1]}: {total_us:g} us in all: are the times in microseconds?"
            )
    if folder.bandwidth and not 0.01 <= max(folder.bandwidth.values()) <= 2000:
        warnings.append(f"the link reaches {max(folder.bandwidth.values()):g} GB/s: is it in GB/s?")
    return warnings


def cluster_from_aceso(folder: AcesoFolder, *, name: str, num_devices: int, memory_bytes: float) -> Cluster:
    """Return one node of equal devices, its link measured at each message size of the folder."""
    if not folder.bandwidth:
        raise InvalidDocument(f"the folder has no {_LINK}, so the link is unknown", field=_LINK)
    segments = tuple(
        LinkSegment(from_bytes=size * MIB if index else 0.0, latency_s=0.0, bytes_per_s=rate * 1e9)
        for index, (size, rate) in enumerate(sorted(folder.bandwidth.items()))
    )
    collectives = {
        f"{operation.replace('_', '-')}/{ranks}": tuple(
            LinkSegment(from_bytes=size * MIB, latency_s=0.0, bytes_per_s=size * MIB / (milliseconds * 1e-3))
            for size, milliseconds in table.items()
            if milliseconds > 0 and size > 0
        )
        for (operation, ranks), table in folder.collectives.items()
    }
    link = LinkLevel(
        name="node",
        num_devices=num_devices,
        latency_s=0.0,
        bytes_per_s=max(folder.bandwidth.values()) * 1e9,
        segments=segments,
        collectives=collectives,
        source=Source.MEASURED,
    )
    device = Device(
        name="device", memory_bytes=memory_bytes, memory_bytes_per_s=9e11, flops={"fp16": 1.25e14, "fp32": 1.57e13}
    )
    group = NodeGroup(name="node", device=device, num_nodes=1, devices_per_node=num_devices, links=(link,))
    return Cluster(name=name, groups=(group,))


def _layer_class(folder: AcesoFolder, index: int, sequence_length: int) -> LayerClass:
    best: dict[tuple[int, int], AcesoOperator] = {}
    for (microbatch, tensor, _), rows in sorted(folder.operators.items()):
        row = rows[index]
        known = best.get((microbatch, tensor))
        if known is None or row.forward_us + row.backward_us < known.forward_us + known.backward_us:
            best[microbatch, tensor] = row
    unsharded = best[min(best, key=lambda key: (key[1], key[0]))]
    return LayerClass(
        kind="other",
        parameters=round(unsharded.weights_mib * MIB / PARAMETER_BYTES),
        costs=tuple(
            _cost(row, microbatch, tensor, sequence_length) for (microbatch, tensor), row in sorted(best.items())
        ),
    )


def _cost(row: AcesoOperator, microbatch: int, tensor: int, sequence_length: int) -> ConfigurationCost:
    backward_s = row.backward_us * 1e-6
    share = 0.5 if row.weights_mib else 0.0
    return ConfigurationCost(
        microbatch=microbatch,
        sequence_length=sequence_length,
        tensor_degree=tensor,
        forward_s=row.forward_us * 1e-6,
        input_grad_s=backward_s * (1 - share),
        weight_grad_s=backward_s * share,
        recompute_s={Recompute.FULL: row.forward_us * 1e-6},
        activation_bytes={Recompute.NONE: row.activations_mib * MIB, Recompute.FULL: 0.0},
        workspace_bytes=max(row.forward_reserved_mib, row.backward_reserved_mib) * MIB,
        output_bytes=row.output_mib * MIB,
        source=Source.MEASURED,
        sources={"input_grad_s": Source.ANALYTIC, "weight_grad_s": Source.ANALYTIC} if share else {},
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDocument(f"{path}: cannot be read: {error}") from error


def _number(text: str, where: str, field: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise InvalidDocument(f"{where}: {field} is {text!r}, not a number", field=field) from error
    if not math.isfinite(value) or value < 0:
        raise InvalidDocument(f"{where}: {field} is {value}, it must be finite and at least 0", field=field)
    return value
