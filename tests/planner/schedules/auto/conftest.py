"""Small instances, random ones, and the exhaustive search that they are judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
from numba import njit

from stagewright.planner.schedules.auto.instance import Instance, make_instance
from stagewright.planner.schedules.auto.sweep import sweep
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.gems import opposite_placement
from stagewright.planner.schedules.schedule import loop_placement, wave_placement

MakeInstance = Callable[..., Instance]


@pytest.fixture(scope="session")
def uniform_instance() -> MakeInstance:
    """Factory of instances with equal stages: (ranks, microbatches, chunks, shape, costs, latency, cap)."""

    def make(
        ranks: int,
        microbatches: int,
        chunks: int = 1,
        shape: str = "loop",
        costs: tuple[float, float, float] = (1.0, 1.0, 1.0),
        latency: float = 0.0,
        cap: float | None = None,
    ) -> Instance:
        place = wave_placement if shape == "wave" else loop_placement
        return make_instance(
            StageCosts.uniform(
                ranks * chunks,
                forward_s=costs[0],
                input_grad_s=costs[1],
                weight_grad_s=costs[2],
                num_chunks=chunks,
            ),
            place(ranks, chunks),
            num_ranks=ranks,
            num_microbatches=microbatches,
            latency_s=latency,
            memory_cap=cap,
        )

    return make


@pytest.fixture(scope="session")
def random_instance() -> MakeInstance:
    """Factory of uneven instances: (generator, ranks, microbatches, chunks, whole times, two copies in opposite directions)."""

    def make(
        rng: np.random.Generator,
        ranks: int,
        microbatches: int,
        chunks: int = 1,
        *,
        whole: bool = False,
        both_ways: bool = False,
    ) -> Instance:
        stages = ranks * chunks

        def draw() -> npt.NDArray[np.float64]:
            return rng.integers(1, 8, stages).astype(float) if whole else rng.uniform(0.5, 1.5, stages)

        share = rng.choice([0.0, 0.0, 0.5, 1.0])
        costs = StageCosts.of(
            draw(),
            draw(),
            draw(),
            activation=rng.choice([0.5, 1.0, 1.5], stages) if rng.random() < 0.3 else None,
            freed_at_input_grad=np.full(stages, share),
        )
        place = wave_placement if rng.random() < 0.5 else loop_placement
        placement = opposite_placement(ranks) if both_ways else place(ranks, chunks)
        least = np.max([np.bincount(copy, weights=costs.activation) for copy in placement], axis=0)
        slack = rng.choice([0.0, 0.5, 1.0, 2.0, np.inf])
        return make_instance(
            costs,
            placement,
            num_ranks=ranks,
            num_microbatches=microbatches,
            latency_s=float(rng.choice([0.0, 0.3, 1.0, 3.0])),
            memory_cap=least * (1.0 + slack * rng.random(ranks)) if np.isfinite(slack) else None,
        )

    return make


@pytest.fixture(scope="session")
def brute_force() -> Callable[[Instance], float]:
    """The least makespan over all orders that keep the caps, by looking at every one of them."""

    def least(instance: Instance) -> float:
        words = [np.array(list(_rank_words(instance, rank)), dtype=np.int32) for rank in range(instance.num_ranks)]
        counts = np.array([len(rank_words) for rank_words in words])
        table = np.full((instance.num_ranks, counts.max(), int(instance.tables.lengths.max())), -1, dtype=np.int32)
        for rank, rank_words in enumerate(words):
            table[rank, : len(rank_words), : rank_words.shape[1]] = rank_words
        return float(_least(instance.tables, table, counts))

    return least


def _rank_words(instance: Instance, rank: int) -> Iterator[list[int]]:
    """Yield every word of a rank in which F, I, W of a stage follow each other and memory stays within the cap."""
    tables, total = instance.tables, instance.num_microbatches
    own = [letter for letter in range(instance.num_letters) if tables.rank[letter] == rank]
    done = dict.fromkeys(own, 0)
    word: list[int] = []

    def extend(live: float) -> Iterator[list[int]]:
        if len(word) == tables.lengths[rank]:
            yield list(word)
            return
        for letter in own:
            count = done[letter]
            if count == total or (letter % 3 and done[letter - 1] <= count):
                continue
            if live + tables.held[letter] > tables.cap[rank]:
                continue
            done[letter] += 1
            word.append(letter * total + count)
            yield from extend(live + tables.held[letter])
            word.pop()
            done[letter] -= 1

    yield from extend(0.0)


@njit
def _least(tables, table, counts):  # type: ignore[no-untyped-def]
    ranks = len(counts)
    chosen = np.zeros(ranks, dtype=np.int64)
    words = table[:, 0].copy()
    end_s = np.empty(len(tables.rank) * tables.num_microbatches)
    best = np.inf
    while True:
        best = min(best, sweep(tables, words, end_s))
        rank = 0
        while rank < ranks:
            chosen[rank] += 1
            if chosen[rank] == counts[rank]:
                chosen[rank] = 0
            words[rank] = table[rank, chosen[rank]]
            if chosen[rank] > 0:
                break
            rank += 1
        if rank == ranks:
            return best
