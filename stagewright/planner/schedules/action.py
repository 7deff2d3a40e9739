"""One action of a pipeline schedule and its text.

Grammar, compatible with the cells of torch's pipelining CSV:

    action := [replica ":"] stage KIND [microbatch ["." slice]]
    fused  := "(" action ";" action ")" "OVERLAP_F_B"

`2F0` is the forward of stage 2 on microbatch 0, `1I3` an input gradient, `2F0.3` the forward of slice 3, `1:2B0` a
full backward on the second replica, `0REDUCE_GRAD` a gradient reduction of stage 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import IntEnum

from stagewright.planner.errors import InvalidSchedule


class Kind(IntEnum):
    """What an action does; the value is the code in a schedule's arrays, the name is its text."""

    F = 0  # forward
    B = 1  # full backward: input and weight gradient
    I = 2  # input gradient  # noqa: E741
    W = 3  # weight gradient
    R = 4  # recompute the forward before a backward
    SEND_F = 5  # send the stage's output to the next stage
    RECV_F = 6  # receive the stage's input from the previous stage
    SEND_B = 7  # send the input gradient to the previous stage
    RECV_B = 8  # receive the output gradient from the next stage
    UNSHARD = 9  # gather the stage's sharded parameters
    RESHARD = 10  # drop the gathered parameters
    REDUCE_GRAD = 11  # reduce the stage's gradients over its data-parallel group
    OPT = 12  # optimizer step of the stage
    OFFLOAD = 13  # activation to host memory
    RELOAD = 14  # activation back from host memory
    EVICT = 15  # activation to the peer rank (BPipe)
    LOAD = 16  # activation back from the peer rank
    FILL = 17  # foreign work placed in a bubble (PipeFisher, Optimus)


COMPUTE_KINDS = frozenset({Kind.F, Kind.B, Kind.I, Kind.W, Kind.R, Kind.FILL})
SEND_KINDS = frozenset({Kind.SEND_F, Kind.SEND_B})
RECV_KINDS = frozenset({Kind.RECV_F, Kind.RECV_B})

_TEXT = re.compile(
    r"^(?:(\d+):)?(\d+)("
    + "|".join(sorted((k.name for k in Kind), key=len, reverse=True))
    + r")(?:(\d+)(?:\.(\d+))?)?$"
)


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One typed action; `microbatch` and `slice` are -1 where they mean nothing (REDUCE_GRAD, OPT ...)."""

    kind: Kind
    stage: int
    microbatch: int = -1
    slice: int = -1
    replica: int = 0

    def __str__(self) -> str:
        prefix = f"{self.replica}:" if self.replica else ""
        microbatch = "" if self.microbatch < 0 else str(self.microbatch)
        suffix = "" if self.slice < 0 else f".{self.slice}"
        return f"{prefix}{self.stage}{self.kind.name}{microbatch}{suffix}"

    def with_kind(self, kind: Kind) -> Action:
        """Return the same action with another kind."""
        return replace(self, kind=kind)


def parse_action(text: str) -> Action:
    """Return the action that `text` prints; raises InvalidSchedule with the text and the grammar."""
    match = _TEXT.match(text.strip())
    if match is None:
        raise InvalidSchedule(
            f"{text!r} is not an action",
            hint="an action reads [replica:]stage KIND [microbatch[.slice]], for example 2F0, 1I3, 2F0.3 or 1:2B0",
        )
    replica, stage, kind, microbatch, slice_index = match.groups()
    return Action(
        Kind[kind],
        int(stage),
        -1 if microbatch is None else int(microbatch),
        -1 if slice_index is None else int(slice_index),
        0 if replica is None else int(replica),
    )
