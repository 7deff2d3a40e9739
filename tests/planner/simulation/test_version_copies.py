"""Copies that weight versions cost, counted by hand for each policy."""

from __future__ import annotations

import pytest

from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.simulation.version_copies import version_copies


def copies_of(name, ranks=2, microbatches=4, **parameters):
    return version_copies(generate(name, ScheduleRequest(ranks, microbatches, parameters=parameters)))


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "chimera"])
def test_orders_that_flush_copy_nothing(name):
    assert copies_of(name) is None


@pytest.mark.parametrize(("name", "every"), [("pipedream", 1), ("ampnet", 1), ("2bw", 4), ("wpipe", 4)])
def test_an_update_makes_one_version_and_zeroes_no_gradients(name, every):
    found = copies_of(name)
    assert found.update.tolist() == pytest.approx([1 - 2 / 3] * len(found.update))
    assert found.accumulation.tolist() == pytest.approx([-2 / 3 / every] * len(found.update))
    assert not found.forward.any() and not found.backward.any()


def test_spectrain_moves_the_weights_only_where_updates_lie_ahead():
    """floor(k / 2) + N - k - 1 = 2, 1, 1 before the forwards of 3 stages, 0, 0, 1 before the backwards."""
    found = copies_of("spectrain", ranks=3)
    assert found.forward.tolist() == pytest.approx([4 / 3, 4 / 3, 4 / 3])
    assert found.backward.tolist() == pytest.approx([1, 1, 4 / 3])
    assert found.update.tolist() == pytest.approx([-2 / 3] * 3)


def test_xpipe_shares_a_prediction_among_the_microbatches_of_an_update():
    found = copies_of("xpipe")
    assert found.forward.tolist() == pytest.approx([1 + 4 / 4, 1 + 1 / 4])
    assert found.backward.tolist() == pytest.approx([1 + 1 / 4, 1 + 1 / 4])


def test_avgpipe_shares_the_mean_among_its_pipelines():
    found = copies_of("avgpipe", pipelines=3)
    assert found.pipelines == 3
    assert found.update.tolist() == pytest.approx([1 + (1 + 2 + 2 / 3) / 3 + 1 - 2 / 3] * 2)
    assert found.accumulation.tolist() == pytest.approx([-2 / 3 / 4] * 2)
