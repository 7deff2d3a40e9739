"""Process groups of one rank, made once for each set of ranks and purpose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.distributed as dist


class Groups:
    """Makes groups; every rank must ask for the same groups in the same order, members or not."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup | None] = {}

    def make(self, purpose: str, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Return the group of these ranks; None when this rank alone is in it, or is not."""
        key = (purpose, tuple(sorted(ranks)))
        if key not in self._made:
            group = dist.new_group(list(key[1])) if len(key[1]) > 1 else None
            self._made[key] = group if group is not None and dist.get_rank() in key[1] else None
        return self._made[key]

    def make_all(self, purpose: str, sets: Iterable[Sequence[int]]) -> dist.ProcessGroup | None:
        """Return this rank's group among disjoint sets of ranks, which all ranks list alike."""
        mine = None
        for ranks in sorted({tuple(sorted(group)) for group in sets}):
            group = self.make(purpose, ranks)
            mine = group or mine
        return mine

    def close(self) -> None:
        """Destroy the groups."""
        for group in self._made.values():
            if group is not None:
                dist.destroy_process_group(group)
        self._made.clear()
