"""What a schedule search is asked for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.costs import Floats, StageCosts
from stagewright.planner.schedules.schedule import Schedule

DEFAULT_CHUNKS = (1, 2, 4)
MOST_COPIES = 2  # of the weights, on each rank


class PlacementChoice(StrEnum):
    """Which maps from virtual stages to ranks may be tried."""

    ANY = "any"  # loop and wave, and two copies in opposite directions
    LOOP = "loop"  # stage s on rank s mod D
    V = "v"  # wave with two chunks
    WAVE = "wave"  # turns around at each end, an even number of chunks
    OPERATORS = "operators"  # every map of the entries of the costs to the ranks; for a handful of entries


class Effort(StrEnum):
    """Size of a search."""

    LOW = "low"  # 1 to 3 seconds on one core, half of them for the named schedules that start it
    NORMAL = "normal"  # about 8
    HIGH = "high"  # about 80; two copies of the weights add up to a quarter


class Stop(StrEnum):
    """Why a search ended."""

    OPTIMAL = "optimal"  # the makespan meets the bound
    BUDGET = "budget"  # all evaluations are used
    DEADLINE = "deadline"  # the outer stop came first; the result is then not reproducible


EVALUATIONS = {Effort.LOW: 500_000, Effort.NORMAL: 5_000_000, Effort.HIGH: 60_000_000}


@dataclass(frozen=True, eq=False)
class AutoRequest:
    """One search.

    Parameters
    ----------
    num_ranks, num_microbatches : D and T.
    costs : of a list of layers or stages in model order, N of them. A placement with v chunks has S = v D virtual stages: N = S
        takes the entries as they are; N a multiple of S sums N / S neighbours into each stage; equal entries are shared
        out evenly whatever N is. Placements for which none of this holds are not tried.
    latency_s : one hop between two ranks.
    memory_cap : most live activation of a rank in the unit of `costs.activation`, one number or one for each rank; None for
        no cap. With a rank's microbatch as the unit of activation (`StageCosts.uniform`) it counts rank-microbatches.
    placement : which maps may be tried, or one map, int32 [num_stages].
    chunk_counts : virtual stages on a rank, of each copy of the model, that may be tried.
    copies : most copies of its weights that a rank may hold. 2 adds, to `PlacementChoice.ANY` with one chunk, two copies of the model
        that run over the ranks in opposite directions, where T is even. `memory_cap` counts activations alone.
    effort : budget by name; `evaluations` overrides it, counted in annealing moves (dearer evaluations count as several). Two copies
        are searched after all orders of one, with a quarter of the budget on top, and only where their bound leaves room.
    seed : of all random draws.
    """

    num_ranks: int
    num_microbatches: int
    costs: StageCosts
    latency_s: float = 0.0
    memory_cap: float | Floats | None = None
    placement: PlacementChoice | npt.NDArray[np.int32] = PlacementChoice.ANY
    chunk_counts: tuple[int, ...] = DEFAULT_CHUNKS
    copies: int = MOST_COPIES
    effort: Effort = Effort.NORMAL
    evaluations: int | None = None
    seed: int = 0

    @property
    def budget(self) -> int:
        """Evaluations that the search may use."""
        return EVALUATIONS[self.effort] if self.evaluations is None else self.evaluations

    def check(self) -> None:
        """Raise InvalidArgument for a size, latency, cap or budget out of its range."""
        for field, value, least in (
            ("num_ranks", self.num_ranks, 1),
            ("num_microbatches", self.num_microbatches, 1),
            ("evaluations", self.budget, 0),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise InvalidArgument(f"{field} is {value}, it must be at least {least}", field=field)
        if self.copies not in range(1, MOST_COPIES + 1):
            raise InvalidArgument(f"copies is {self.copies}, a rank holds 1 or {MOST_COPIES}", field="copies")
        if not np.isfinite(self.latency_s) or self.latency_s < 0.0:
            raise InvalidArgument(f"latency_s is {self.latency_s}, it must be finite and at least 0", field="latency_s")
        if not self.chunk_counts or min(self.chunk_counts) < 1:
            raise InvalidArgument(f"chunk_counts is {self.chunk_counts}, each must be at least 1", field="chunk_counts")
        if self.memory_cap is not None:
            cap = np.asarray(self.memory_cap, dtype=np.float64)
            if cap.shape not in ((), (self.num_ranks,)):
                raise InvalidArgument(
                    f"memory_cap has {cap.size} values for {self.num_ranks} ranks; give one, or one for each rank",
                    field="memory_cap",
                )
            if np.isnan(cap).any() or (cap <= 0.0).any():
                raise InvalidArgument(f"memory_cap is {cap.tolist()}, it must be above 0", field="memory_cap")


@dataclass(frozen=True)
class Gain:
    """What the search gained over the best named schedule that fits, by cause.

    Parameters
    ----------
    name : the named schedule with the least makespan, on any placement of the request: of the synchronous ones with as many copies of
        the weights as it allows whose order keeps the caps (see `seed`). Those left out are proved not to be shorter, unless a
        deadline came first.
    named_s : its makespan as it is generated, the pairs of F and B that dualpipe fuses one after the other (`fused` = 0), which is shorter.
    split_s : least makespan of a named schedule that was generated, when every full backward is split into I and W.
    found_s : makespan of the result.
    """

    name: str
    named_s: float
    split_s: float
    found_s: float

    @property
    def splitting_s(self) -> float:
        """Seconds won by splitting backwards alone."""
        return self.named_s - self.split_s

    @property
    def reordering_s(self) -> float:
        """Seconds won by the order and the placement, beyond splitting."""
        return self.split_s - self.found_s


@dataclass(frozen=True)
class OneCopy:
    """The best order found with one copy of the weights: makespan, and seconds that no such order undercuts."""

    makespan_s: float
    bound_s: float


@dataclass(frozen=True, eq=False)
class AutoResult:
    """The best order found, with its proof.

    Parameters
    ----------
    schedule : the order; adjacent I and W are one B where that costs no time.
    costs : of the schedule's virtual stages.
    placement, num_chunks : the placement's name ("loop", "v", "wave", "given" or "bidirectional") and chunks of a rank, of each copy.
    num_copies : of its weights that a rank holds; 2 where that is shorter.
    one_copy : what one copy takes, the same where num_copies is 1.
    makespan_s : from the first start to the last end.
    bound_s : no order on any placement tried ends sooner.
    evaluations : orders timed, each counted once.
    stop : why the search ended.
    gain : over the best named schedule that fits; None when none does.
    """

    schedule: Schedule
    costs: StageCosts
    placement: str
    num_chunks: int
    num_copies: int
    one_copy: OneCopy
    makespan_s: float
    bound_s: float
    evaluations: int
    stop: Stop
    gain: Gain | None

    @property
    def optimal(self) -> bool:
        """Whether the makespan is proved least over the placements tried."""
        return self.stop is Stop.OPTIMAL

    @property
    def gap(self) -> float:
        """Makespan over bound, less one."""
        return self.makespan_s / self.bound_s - 1.0
