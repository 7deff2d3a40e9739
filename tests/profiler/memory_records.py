"""What a bench measures of memory, with made-up numbers."""

from __future__ import annotations

from typing import Any

NAMES = (
    "saved_bytes",
    "output_bytes",
    "unkept_input_bytes",
    "workspace_bytes",
    "input_grad_workspace_bytes",
    "weight_grad_workspace_bytes",
    "selective_bytes",
    "full_bytes",
    "forward_flops",
)


def memory_record(row: list[float], forward: list[float] | None = None) -> dict[str, Any]:
    """Return a record in which every quantity has the same numbers by layer, the forward's workspace others where they are given."""
    return {
        "unused_parameters": [0] * len(row),
        "sums": [[] for _ in row],
        "forward_workspace_bytes": {"none": row if forward is None else forward},
        **dict.fromkeys(NAMES, row),
    }
