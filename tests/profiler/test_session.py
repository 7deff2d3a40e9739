"""How long a session goes on measuring, on a bench whose steps take what they are told to."""

import pytest
from memory_records import memory_record

from stagewright.profiler.journal import Journal
from stagewright.profiler.model_bench import Configuration
from stagewright.profiler.session import MOST_SHORT_STEPS, WANTED, Session
from stagewright.profiler.settings import ProfileSettings

CONFIGURATION = Configuration(1, 16)


class Bench:
    """Counts its steps; each takes a forward and a backward of the same time, and the clock moves with them."""

    def __init__(self, forward_s):
        self.forward_s, self.now_s, self.steps = forward_s, 0.0, 0

    def warm_up(self, configuration):
        pass

    def measure(self, configuration, kind):
        if kind == "memory":
            return memory_record([1.0], [0.0])
        self.steps += 1
        self.now_s += 4 * self.forward_s
        extra = dict.fromkeys(("outside_s", "entrance_s", "empty_step_s", "busy_share"), 1.0)
        return {"forward_s": [self.forward_s], "backward_s": [self.forward_s], "optimizer_s": [0.0], **extra}


@pytest.mark.parametrize(("forward_s", "steps"), [(0.01, 50), (0.0001, MOST_SHORT_STEPS), (0.2, WANTED["step"])])
def test_short_steps_are_measured_for_a_quarter_of_the_budget(forward_s, steps):
    bench = Bench(forward_s)
    settings = ProfileSettings((CONFIGURATION,), compiled=True, budget_s=8.0)
    session = Session(settings, bench, Journal(None, {}, resume=False), lambda *_: None, now_s=lambda: bench.now_s)
    session.measure((CONFIGURATION,))
    assert steps <= bench.steps <= steps + 1


def test_late_steps_are_made_the_least_number_of_times():
    bench = Bench(1.0)
    settings = ProfileSettings((CONFIGURATION,), compiled=True, budget_s=4.0)
    session = Session(settings, bench, Journal(None, {}, resume=False), lambda *_: None, now_s=lambda: bench.now_s)
    session.measure((CONFIGURATION,))
    assert bench.steps == 3
