"""One profile in the making: which measurements are still wanted, in which order, until when.

Measurements of all configurations and kinds take turns, and each round goes through them in the opposite direction, so
that drift of the clock falls on all alike. Steps are measured until the medians of the latest samples agree and, where
steps are short, until they took a quarter of the budget, since a machine's speed changes from one second to the next; nothing
goes on beyond the budget once each measurement was made the least number of times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from stagewright.modeling.kept_memory import keep_freed_memory
from stagewright.planner.documents import Recompute
from stagewright.planner.errors import InvalidArgument, StagewrightError
from stagewright.profiler.journal import Journal, Record
from stagewright.profiler.measured_layers import (
    ConfigurationNumbers,
    configuration_numbers,
    reference_probe_seconds,
    saves_anything,
)
from stagewright.profiler.model_bench import Configuration, Kind, ModelBench
from stagewright.profiler.model_source import ModelSource
from stagewright.profiler.ranks import RankContext, ReportsProgress, start_ranks
from stagewright.profiler.settings import ProfileSettings
from stagewright.profiler.timing import is_stable

WANTED: Mapping[Kind, int] = {"step": 6, "split": 6, "full": 3, "selective": 3, "memory": 1}
LEAST: Mapping[Kind, int] = {"step": 3, "split": 2, "full": 2, "selective": 2, "memory": 1}
MOST_STEPS = 15
MOST_SHORT_STEPS = 300
STEPS_SHARE = 0.25  # of the budget, for steps too short to show how the machine's speed changes
STABLE = 0.02
_LEVELS: Mapping[str, Recompute] = {"selective": Recompute.SELECTIVE, "full": Recompute.FULL}


class Session:
    """Measures what is missing of some configurations and keeps it in a journal.

    Parameters
    ----------
    bench : what runs a measurement.
    journal : measurements so far, of an earlier run too.
    probe_s : what a probe takes at the speed that all seconds are brought to; None for the median of this session's.
    now_s : the clock of the budget.
    """

    def __init__(
        self,
        settings: ProfileSettings,
        bench: ModelBench,
        journal: Journal,
        report: ReportsProgress,
        *,
        probe_s: float | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._bench = bench
        self._journal = journal
        self._report = report
        self._now_s = now_s
        self._probe_s = probe_s
        self._too_large: set[Configuration] = set()
        self._steps_s = STEPS_SHARE * settings.budget_s / max(len(settings.configurations), 1)

    def measure(self, configurations: Sequence[Configuration]) -> dict[Configuration, ConfigurationNumbers]:
        """Return the numbers of each configuration that fits the device, measuring what the journal does not hold."""
        configurations = [configuration for configuration in configurations if self._fits(configuration)]
        pairs = [(configuration, kind) for kind in self._settings.kinds for configuration in configurations]
        end_s = self._now_s() + self._settings.budget_s
        total = sum(WANTED[kind] for _, kind in pairs)
        forwards = True
        while True:
            late = self._now_s() >= end_s
            open_pairs = [pair for pair in pairs if self._is_wanted(*pair, late=late)]
            if not open_pairs:
                break
            for configuration, kind in open_pairs if forwards else reversed(open_pairs):
                if self._is_wanted(configuration, kind, late=self._now_s() >= end_s):
                    done = sum(min(self._count(*pair), WANTED[pair[1]]) for pair in pairs)
                    self._report("profile", done, total)
                    self._take(configuration, kind)
            forwards = not forwards
        self._report("profile", total, total)
        fitting = [configuration for configuration in configurations if configuration not in self._too_large]
        return {configuration: self._numbers(configuration) for configuration in fitting}

    def _take(self, configuration: Configuration, kind: Kind) -> None:
        """Make one measurement; a kind that needs more memory than a step may show that a configuration does not fit."""
        try:
            numbers = self._bench.measure(configuration, kind)
        except torch.OutOfMemoryError:
            self._too_large.add(configuration)
            self._bench.forget(configuration)
            return
        except StagewrightError:
            raise
        except Exception as error:
            raise InvalidArgument(
                f"the model failed while its {kind} was measured ({configuration.text}): {type(error).__name__}: {error}",
                field="model",
                hint="it ran plainly before: the layers must run alike with deferred gradients and when recomputed",
            ) from error
        self._journal.add(Record(_key(configuration), kind, numbers))

    def _fits(self, configuration: Configuration) -> bool:
        """Warm a configuration up; False when the device's memory does not suffice for it.

        Whatever else goes wrong is the model's own, on the first batch it is given: raises InvalidArgument.
        """
        try:
            self._bench.warm_up(configuration)
        except torch.OutOfMemoryError:
            self._bench.forget(configuration)
            return False
        except StagewrightError:
            raise
        except Exception as error:
            raise InvalidArgument(
                f"the model failed on its first batch ({configuration.text}): {type(error).__name__}: {error}",
                field="data",
                hint="name a data factory whose batches the model takes: --data module:factory",
            ) from error
        return True

    def _count(self, configuration: Configuration, kind: Kind) -> int:
        return len(self._journal.of(_key(configuration), kind))

    def _is_wanted(self, configuration: Configuration, kind: Kind, *, late: bool) -> bool:
        """Whether one more measurement would help: late, only the least count matters."""
        if configuration in self._too_large:
            return False
        count = self._count(configuration, kind)
        if kind in _LEVELS and not self._is_worthwhile(configuration, _LEVELS[kind]):
            return False
        if late or count < WANTED[kind] or kind != "step":
            return count < (LEAST if late else WANTED)[kind]
        totals = self._totals(configuration)
        if count < MOST_STEPS and not is_stable(totals, tolerance=STABLE):
            return True
        return count < MOST_SHORT_STEPS and 2 * sum(totals) < self._steps_s

    def _is_worthwhile(self, configuration: Configuration, level: Recompute) -> bool:
        """Whether a level is known to save nothing, and need not be timed."""
        memory = self._journal.of(_key(configuration), "memory")
        return not memory or saves_anything(memory[0], level)

    def _totals(self, configuration: Configuration) -> list[float]:
        samples = self._journal.of(_key(configuration), "step")
        return [sum(item["forward_s"]) + sum(item["backward_s"]) for item in samples]

    @property
    def probe_s(self) -> float | None:
        """What a probe takes at the speed that the numbers are brought to; None where no probe was made."""
        return self._probe_s or reference_probe_seconds(record.numbers for record in self._journal.records)

    def _numbers(self, configuration: Configuration) -> ConfigurationNumbers:
        return configuration_numbers(
            {kind: self._journal.of(_key(configuration), kind) for kind in self._settings.kinds}, probe_s=self.probe_s
        )


@contextmanager
def busy_siblings(
    source: ModelSource,
    settings: ProfileSettings,
    configurations: Sequence[Configuration],
    report: ReportsProgress,
    *,
    num_layers: int | None = None,
) -> Iterator[None]:
    """Keep as many other ranks busy with the same work as the run will have; return once all of them are."""
    count = settings.num_busy_ranks - 1 if settings.torch_device.type == "cpu" else 0
    if not count:
        yield
        return
    arguments = {
        "model": source.reference,
        "data": source.data,
        "layers": source.layers,
        "num_layers": num_layers,
        "dtype": settings.dtype,
        "num_threads": settings.num_threads,
        "configurations": [_key(configuration) for configuration in configurations],
    }
    report("busy ranks", 0, count)
    with start_ranks(
        "stagewright.profiler.session:busy_rank", count, arguments, num_threads=settings.num_threads
    ) as ranks:
        ranks.wait_until("busy", timeout_s=120.0)
        report("busy ranks", count, count)
        yield


def busy_rank(
    context: RankContext,
    model: str,
    data: str | None,
    layers: str | None,
    num_layers: int | None,
    dtype: str,
    num_threads: int,
    configurations: Sequence[Sequence[int]],
) -> None:
    """Keep one core busy with the model's own work until the parent stops it."""
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    settings = ProfileSettings((), dtype=dtype)  # type: ignore[arg-type]
    source = ModelSource(model, None, data, layers)
    wanted = [Configuration(*values) for values in configurations]
    model_shard = source.build(
        device=torch.device("cpu"),
        dtype=settings.torch_dtype,
        num_layers=num_layers,
        tensor_degree=wanted[0].tensor_degree,
    )
    bench = ModelBench(source, source.split(model_shard), torch.device("cpu"))
    bench.warm_up(wanted[0])
    context.report("busy", 1, 1)
    while not context.stopped.is_set():
        for configuration in wanted:
            if not context.stopped.is_set():
                bench.measure(configuration, "step")


def _key(configuration: Configuration) -> tuple[int, int, int]:
    return (configuration.microbatch, configuration.sequence_length, configuration.tensor_degree)
