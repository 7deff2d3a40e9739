"""Reading the output of nccl-tests (all_reduce_perf and its sisters) into link levels.

Its tables hold, for each size, out-of-place and in-place time in microseconds, algorithm and bus bandwidth. The size is
the one of these documents for all-reduce, all-gather, reduce-scatter and send-receive; for all-to-all it is one rank's
send buffer too. The out-of-place time is taken. The operation is known from the program's name in the header, or from
the file's name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stagewright.planner.documents import Cluster, LinkLevel, NodeGroup, Source
from stagewright.planner.errors import InvalidDocument
from stagewright.profiler.alpha_beta import AlphaBetaFit, fit_alpha_beta

_PROGRAMS = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "alltoall": "all-to-all",
    "sendrecv": "send-receive",
}
_MIN_COLUMNS = 11
_COLUMNS_FROM_TIME = 8
_RANK = re.compile(r"^#\s+Rank\s+\d+\b.*\bdevice\b", re.IGNORECASE)


@dataclass(frozen=True)
class NcclTest:
    """One table: the operation, how many ranks took part, sizes in bytes and seconds."""

    operation: str
    num_ranks: int
    sizes_bytes: tuple[float, ...]
    seconds: tuple[float, ...]

    def fit(self) -> AlphaBetaFit:
        """Return the piecewise lines of this operation."""
        return fit_alpha_beta(self.sizes_bytes, self.seconds)


def read_nccl_tests(path: Path) -> NcclTest:
    """Return the table in a file; raises InvalidDocument when it is no nccl-tests output."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InvalidDocument(f"{path}: cannot be read: {error}", hint="give the path of nccl-tests output") from error
    return parse_nccl_tests(text, source=str(path))


def parse_nccl_tests(text: str, *, source: str = "nccl-tests output") -> NcclTest:
    """Return the table in a text.

    Raises
    ------
    InvalidDocument : when the operation, the ranks or at least two rows of sizes cannot be found.
    """
    lines = text.splitlines()
    operation = next((name for key, name in _PROGRAMS.items() if key in source or key in text), None)
    if operation is None:
        raise InvalidDocument(
            f"{source}: the operation is not named",
            field="operation",
            hint="keep the header, or name the file after the program, such as all_reduce_perf.txt",
        )
    num_ranks = sum(bool(_RANK.match(line)) for line in lines)
    rows = [row for row in (_row(line) for line in lines) if row is not None]
    if num_ranks < 2 or len(rows) < 2:
        raise InvalidDocument(
            f"{source}: {num_ranks} ranks and {len(rows)} rows with a size above 0 were found, at least 2 of each are needed",
            hint="is this the whole output of an nccl-tests program?",
        )
    # sendrecv_perf sends and receives at once on every rank, so its time is that of one message each way.
    return NcclTest(operation, num_ranks, tuple(row[0] for row in rows), tuple(row[1] for row in rows))


def apply_nccl_tests(cluster: Cluster, tests: Sequence[NcclTest]) -> Cluster:
    """Return the cluster with measured lines at the innermost level of its first group that joins each test's ranks.

    Raises
    ------
    InvalidDocument : when no level joins as many devices as a test had ranks.
    """
    group = cluster.groups[0]
    levels = list(group.links)
    for test in tests:
        index = next((i for i, level in enumerate(levels) if level.num_devices >= test.num_ranks), None)
        if index is None:
            raise InvalidDocument(
                f"the test had {test.num_ranks} ranks, the largest level of {cluster.name} joins {levels[-1].num_devices}",
                field="cluster",
            )
        levels[index] = _measured(levels[index], test)
    changed = NodeGroup.model_validate({**dict(group), "links": tuple(levels)})
    return cluster.model_copy(update={"groups": (changed, *cluster.groups[1:])})


def _measured(level: LinkLevel, test: NcclTest) -> LinkLevel:
    segments = test.fit().segments
    if test.operation == "send-receive":
        return level.model_copy(
            update={
                "segments": segments,
                "latency_s": segments[0].latency_s,
                "bytes_per_s": segments[-1].bytes_per_s,
                "achieved_share": 1.0,
                "source": Source.MEASURED,
            }
        )
    return level.model_copy(
        update={"collectives": {**level.collectives, test.operation: segments}, "source": Source.MEASURED}
    )


def _row(line: str) -> tuple[float, float] | None:
    """Return (bytes, seconds) of a data line, which ends with twice (time in us, algbw, busbw, #wrong)."""
    fields = line.split()
    if len(fields) < _MIN_COLUMNS or not fields[0].isdigit() or float(fields[0]) <= 0:
        return None
    try:
        seconds = float(fields[-_COLUMNS_FROM_TIME]) * 1e-6
    except ValueError:
        return None
    return (float(fields[0]), seconds) if seconds > 0 else None
