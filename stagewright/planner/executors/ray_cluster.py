"""Parts as tasks of a Ray cluster (or of Ray on this machine); one actor holds the least step and the stop flag."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.executors.part import Part, search_part

REFRESH_S = 0.1
POLL_S = 0.05


class Board:
    """What the parts share, as an actor: the least step, and whether to stop."""

    def __init__(self) -> None:
        self.step_s = float("inf")
        self.stopped = False

    def read(self) -> tuple[float, bool]:
        """Return both."""
        return self.step_s, self.stopped

    def offer(self, step_s: float) -> None:
        """Lower the least step."""
        self.step_s = min(self.step_s, step_s)

    def stop(self) -> None:
        """End every part at its next check."""
        self.stopped = True


class ReadsBoard(Protocol):
    """A handle of the board, called over the network."""

    def read(self) -> tuple[float, bool]: ...

    def offer(self, step_s: float) -> None: ...


@dataclass
class BoardView:
    """The board as one part sees it: read at most every REFRESH_S."""

    board: ReadsBoard
    own_s: float = float("inf")
    _seen: tuple[float, bool] = (float("inf"), False)
    _read_at: float = -1.0

    def least_s(self) -> float:
        return min(self.own_s, self._read()[0])

    def offer(self, step_s: float) -> None:
        if step_s < self.own_s:
            self.own_s = step_s
            self.board.offer(step_s)

    def should_stop(self) -> bool:
        """Tell whether the search is to end."""
        return self._read()[1]

    def _read(self) -> tuple[float, bool]:
        now = time.monotonic()
        if now - self._read_at > REFRESH_S:
            self._seen, self._read_at = self.board.read(), now
        return self._seen


class _Remote:
    """Calls the actor and waits for its answer."""

    def __init__(self, actor: object) -> None:
        self.actor = actor

    def read(self) -> tuple[float, bool]:
        import ray

        return cast(tuple[float, bool], ray.get(self.actor.read.remote()))  # type: ignore[attr-defined]

    def offer(self, step_s: float) -> None:
        self.actor.offer.remote(step_s)  # type: ignore[attr-defined]


def _search(part: Part, actor: object) -> PlanOutcome:
    view = BoardView(_Remote(actor))
    return search_part(part, view, view.should_stop)


class RayExecutor:
    """Runs each part as a Ray task; raises InvalidArgument when Ray is not installed."""

    def __init__(self) -> None:
        try:
            import ray
        except ImportError as error:
            raise InvalidArgument(
                "executor ray needs the package 'ray'",
                field="executor",
                hint="pip install 'stagewright[ray]', or take --executor process",
            ) from error
        self.ray = ray

    def run(self, parts: Sequence[Part], should_stop: Callable[[], bool]) -> Iterator[tuple[int, PlanOutcome]]:
        """Yield outcomes as they come; joins the running cluster where there is one, else starts Ray here."""
        ray = self.ray
        started = not ray.is_initialized()
        if started:
            ray.init(log_to_driver=False, include_dashboard=False)
        try:
            actor = ray.remote(num_cpus=0)(Board).remote()
            search = ray.remote(num_cpus=1)(_search)
            waiting = {search.remote(part, actor): place for place, part in enumerate(parts)}
            while waiting:
                if should_stop():
                    actor.stop.remote()
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
                for reference in done:
                    yield waiting.pop(reference), ray.get(reference)
        finally:
            if started:
                ray.shutdown()
