"""Pools of ranks by world size, shared by all tests of the session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def rank_pools() -> Iterator[Callable[[int], object]]:
    pytest.importorskip("torch")
    from rank_pool import RankPool

    pools: dict[int, RankPool] = {}

    def pool(num_ranks: int) -> RankPool:
        return pools.setdefault(num_ranks, RankPool(num_ranks))

    yield pool
    for made in pools.values():
        made.close()
