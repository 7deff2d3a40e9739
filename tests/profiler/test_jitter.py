"""The jitter of a profile's microbatches: what one piece differs from the next, and nothing that changes slowly."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from stagewright.profiler.jitter import LEAST_MICROBATCHES, NUM_RATIOS, jitter_of

LAYERS = 12
MEDIANS_S = np.linspace(1e-3, 3e-3, LAYERS)


def rows(factors):
    """Return forward and backward seconds of microbatches whose layers took `factors` [microbatches, 2 layers] of their medians."""
    factors = np.asarray(factors)
    return factors[:, :LAYERS] * MEDIANS_S, factors[:, LAYERS:] * 2 * MEDIANS_S


def test_a_steady_device_has_none():
    found = jitter_of(*rows(np.ones((9, 2 * LAYERS))))
    assert found is not None
    assert found.ratios == pytest.approx([1.0] * NUM_RATIOS)
    assert found.piece_s == pytest.approx(3 * MEDIANS_S.sum() / 6, rel=0.2)


def test_a_slow_change_of_speed_is_none():
    """A device that slows down by a quarter over 40 microbatches."""
    found = jitter_of(*rows(np.linspace(1.0, 1.25, 40)[:, None] * np.ones((40, 2 * LAYERS))))
    assert found is not None
    assert found.ratios == pytest.approx([1.0] * NUM_RATIOS, abs=0.02)


def deviation(by_piece):
    """Return that of the ratios of microbatches whose six pieces, in the order of time, took `by_piece` times their medians."""
    seconds = np.concatenate((MEDIANS_S, 2 * MEDIANS_S[::-1]))
    piece = np.searchsorted(seconds.sum() * np.arange(1, 6) / 6, np.cumsum(seconds) - seconds, side="right")
    factors = np.asarray(by_piece).reshape(-1, 6)[:, piece]
    factors[:, LAYERS:] = factors[:, : LAYERS - 1 : -1]  # backwards run from the last layer
    found = jitter_of(*rows(factors))
    assert found is not None
    return float(np.std(found.ratios))


def test_waves_of_speed_that_pass_within_some_microbatches_are_none():
    """A host that is 15 % slower and faster again every seven microbatches, and one that is a third slower for three now and then."""
    moments = np.arange(60 * 6)
    assert deviation(1 + 0.15 * np.sin(moments * 2 * np.pi / 42)) < 0.02
    assert deviation(1 + 0.33 * (moments % 90 < 18)) < 0.02


@pytest.mark.parametrize("spread", [0.02, 0.1])
def test_what_every_piece_varies_by_itself_is_kept_with_and_without_waves(spread):
    generator = np.random.default_rng(3)
    alone = 1 + spread * generator.standard_normal(100 * 6)
    waves = 1 + 0.15 * np.sin(np.arange(100 * 6) * 2 * np.pi / 42)
    assert deviation(alone) == pytest.approx(spread, rel=0.15)
    assert deviation(alone * waves) == pytest.approx(spread, rel=0.3)


def test_rare_long_pieces_stay_in_the_mean():
    """One piece of six is twice as long in every fifth microbatch: 1/30 of all pieces, a mean of 1 + 1/30."""
    factors = np.ones((40, 2 * LAYERS))
    factors[::5, 2 * LAYERS - 1] += 3 * MEDIANS_S.sum() / 6 / (2 * MEDIANS_S[-1])
    found = jitter_of(*rows(factors))
    assert found is not None
    assert np.mean(found.ratios) == pytest.approx(1 + 1 / 30, abs=0.01)
    assert found.ratios[0] == pytest.approx(1.0) and found.ratios[-1] > 1.3


def test_too_few_microbatches_say_nothing():
    assert jitter_of(*rows(np.ones((LEAST_MICROBATCHES - 1, 2 * LAYERS)))) is None
    assert jitter_of(*rows(np.ones((LEAST_MICROBATCHES, 2 * LAYERS)))) is not None
