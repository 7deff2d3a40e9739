"""One search instance: chains of virtual stages on given ranks, as arrays for the kernels.

Vocabulary of this package. A *letter* is a (stage, kind) pair, coded ``3 * stage + kind`` with F = 0, I = 1, W = 2. An
*action* is a letter with a microbatch, coded ``letter * num_microbatches + microbatch``. Time arcs:

    F(s, k) after F(s-1, k)      I(S-1, k) after F(S-1, k)      I(s, k) after I(s+1, k)      W(s, k) after I(s, k)

each plus one latency when the two stages live on different ranks. With several copies of the model each is a chain of its own, whose
stages come behind those of the copy before it; the arcs hold within a chain, and every chain runs `num_microbatches`. F adds `activation[s]` to its rank's live memory,
I gives `freed_at_input_grad[s]` of it back, W the rest; a rank's live memory never exceeds its cap. Recomputation
belongs to the input gradient: it runs right before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.schedules.costs import StageCosts

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]

FORWARD, INPUT_GRAD, WEIGHT_GRAD = range(3)

MOST_TICKS = 10_000  # ticks of the longest action; finer costs count as continuous
MEMORY_SLACK = 1e-9  # share of a cap that rounding may take; live memory is a sum of a few hundred terms


class Tables(NamedTuple):
    """What the kernels read, all indexed by letter except `lengths` and `cap` (by rank)."""

    num_microbatches: int
    num_chains: int
    rank: Ints
    predecessor: Ints  # letter that must come before, -1 for the first forward of a chain
    successor: Ints  # letter on the chain that waits for this one, -1 for the last input gradient and for W
    delay_s: Floats  # latency between the predecessor and this letter
    duration_s: Floats
    held: Floats  # change of live memory
    lengths: Ints  # actions of each rank
    cap: Floats  # with the slack added


@dataclass(frozen=True, eq=False)
class Instance:
    """A placement with its costs, `num_microbatches` equal microbatches and caps in the unit of the activations.

    Parameters
    ----------
    num_microbatches : of each chain.
    placement : rank of each virtual stage, int32 [num_stages], chain after chain.
    costs : of the virtual stages, in model order, chain after chain.
    latency_s : one hop between two ranks.
    cap : most live activation of each rank, float64 [num_ranks]; inf for no cap.
    num_chains : copies of the model, each a chain of num_stages / num_chains stages.
    """

    num_ranks: int
    num_microbatches: int
    placement: Ints
    costs: StageCosts
    latency_s: float
    cap: Floats
    num_chains: int = 1

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @property
    def num_letters(self) -> int:
        return 3 * self.num_stages

    @property
    def num_actions(self) -> int:
        return self.num_letters * self.num_microbatches

    @cached_property
    def tables(self) -> Tables:
        """The kernels' view."""
        stages, in_chain = self.num_stages, self.num_stages // self.num_chains
        predecessor = np.full(3 * stages, -1, dtype=np.int32)
        successor = np.full(3 * stages, -1, dtype=np.int32)
        forward, input_grad, weight_grad = (np.arange(stages, dtype=np.int32) * 3 + kind for kind in range(3))
        for first in range(0, stages, in_chain):
            own = slice(first, first + in_chain)
            chain = np.concatenate((forward[own], input_grad[own][::-1]))
            predecessor[chain[1:]] = chain[:-1]
            successor[chain[:-1]] = chain[1:]
        predecessor[weight_grad] = input_grad
        rank = np.repeat(self.placement, 3).astype(np.int32)
        hops = (predecessor >= 0) & (rank != rank[predecessor])
        durations = (self.costs.forward_s, self.costs.input_grad_s + self.costs.recompute_s, self.costs.weight_grad_s)
        freed = self.costs.activation * self.costs.freed_at_input_grad
        held = (self.costs.activation, -freed, freed - self.costs.activation)
        return Tables(
            self.num_microbatches,
            self.num_chains,
            rank,
            predecessor,
            successor,
            np.where(hops, self.latency_s, 0.0),
            np.stack(durations, axis=1).ravel(),
            np.stack(held, axis=1).ravel(),
            (np.bincount(self.placement, minlength=self.num_ranks) * 3 * self.num_microbatches).astype(np.int32),
            self.cap * (1.0 + MEMORY_SLACK),
        )

    @cached_property
    def work_s(self) -> Floats:
        """Seconds of compute on each rank."""
        tables = self.tables
        work_s: Floats = np.bincount(tables.rank, weights=tables.duration_s, minlength=self.num_ranks).astype(
            np.float64
        )
        return work_s * self.num_microbatches

    @cached_property
    def microbatch_memory(self) -> Floats:
        """The most that one microbatch holds on each rank when all chunks of its chain are live: the smallest cap that works."""
        held = np.zeros((self.num_chains, self.num_ranks))
        chain = np.repeat(np.arange(self.num_chains), self.num_stages // self.num_chains)
        np.add.at(held, (chain, self.placement), self.costs.activation)
        most: Floats = held.max(axis=0)
        return most

    @property
    def time_slack_s(self) -> float:
        """Differences below this are rounding."""
        return 1e-9 * float(self.work_s.max())

    @cached_property
    def measure_s(self) -> float | None:
        """The greatest common measure of durations and latency: every makespan is a multiple. None without one."""
        tables = self.tables
        values_s = np.unique(np.concatenate((tables.duration_s, tables.delay_s)))
        values_s = values_s[values_s > 0.0]
        measure_s = 0.0
        for value_s in values_s.tolist():
            measure_s = _common_measure(measure_s, value_s, 1e-9 * float(values_s[-1]))
        ticks = values_s / measure_s
        is_exact = ticks.max() < MOST_TICKS and np.abs(ticks - np.round(ticks)).max() * self.num_actions < 1e-6
        return measure_s if is_exact else None

    @property
    def tick_s(self) -> float:
        """Two different makespans differ by more than this."""
        return self.time_slack_s if self.measure_s is None else self.measure_s * (1.0 - 1e-3)


def _common_measure(first: float, second: float, slack: float) -> float:
    """Return the greatest common measure of two numbers, up to the slack (Euclid)."""
    larger, smaller = max(first, second), min(first, second)
    while smaller > slack:
        rest = larger % smaller
        larger, smaller = smaller, 0.0 if smaller - rest < slack else rest
    return larger


def make_instance(
    costs: StageCosts,
    placement: npt.NDArray[np.int32],
    *,
    num_ranks: int,
    num_microbatches: int,
    latency_s: float,
    memory_cap: float | Floats | None,
) -> Instance:
    """Return the instance of one placement; Infeasible, with the smallest cap that works, when one microbatch cannot fit.

    A placement [num_chains, num_stages] puts as many copies of the stages on the ranks, which share the microbatches evenly.
    """
    num_chains, num_stages = np.atleast_2d(placement).shape
    placement = np.ascontiguousarray(placement, dtype=np.int32).ravel()
    if num_stages != costs.num_stages:
        raise InvalidArgument(f"the placement has {num_stages} stages, the costs {costs.num_stages}", field="placement")
    if num_microbatches % num_chains:
        raise InvalidArgument(
            f"{num_chains} copies of the stages share {num_microbatches} microbatches, which is no multiple of {num_chains}",
            field="num_microbatches",
        )
    costs = costs.without_growth().repeated(num_chains)
    if not np.array_equal(np.unique(placement), np.arange(num_ranks)):
        raise InvalidArgument(
            f"the placement uses ranks {np.unique(placement).tolist()} of {num_ranks}; each rank needs a stage",
            field="placement",
        )
    cap = np.full(num_ranks, np.inf) if memory_cap is None else np.asarray(memory_cap, dtype=np.float64)
    instance = Instance(
        num_ranks,
        num_microbatches // num_chains,
        placement,
        costs,
        float(latency_s),
        np.broadcast_to(cap, num_ranks).copy(),
        num_chains,
    )
    short = instance.microbatch_memory > instance.tables.cap
    if short.any():
        rank = int(np.argmax(short))
        need = float(instance.microbatch_memory.max())
        raise Infeasible(
            f"rank {rank} holds {instance.microbatch_memory[rank]:g} for one microbatch, the cap is {cap_text(cap, rank)}",
            field="memory_cap",
            hint=f"the smallest cap that works is {need:g}",
        )
    return instance


def cap_text(cap: Floats, rank: int) -> str:
    """Return the cap of one rank for a message."""
    return f"{np.broadcast_to(cap, (rank + 1,))[rank] if cap.ndim == 0 else cap[rank]:g}"
