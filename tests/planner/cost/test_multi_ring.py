"""Rings that share no link, and what they and a tree save."""

import math

import pytest

from stagewright.planner.cost.multi_ring import disjoint_rings, multi_ring_s, tree_decode_elements
from stagewright.planner.errors import InvalidArgument


@pytest.mark.parametrize("devices", range(2, 18))
def test_rings_visit_every_device_and_share_no_directed_link(devices):
    rings = disjoint_rings(devices)
    links = [link for ring in rings for link in zip(ring, ring[1:] + ring[:1], strict=True)]
    assert all(sorted(ring) == list(range(devices)) for ring in rings)
    if devices > 2:
        assert len(set(links)) == len(links)
        assert len(rings) == (devices - 1 if devices % 2 else devices - 2)


def test_rings_divide_the_bytes_but_not_the_latency():
    one = multi_ring_s(8e9, 8, latency_s=1e-5, bytes_per_s=1e11)
    six = multi_ring_s(8e9, 8, latency_s=1e-5, bytes_per_s=1e11, rings=6)
    assert one == pytest.approx(7 * (1e-5 + 0.08))
    assert six == pytest.approx(7 * (1e-5 + 0.08 / 6))
    with pytest.raises(InvalidArgument, match="8 devices have 6 disjoint rings, 7 were asked for"):
        multi_ring_s(8e9, 8, latency_s=1e-5, bytes_per_s=1e11, rings=7)


def test_a_tree_sends_what_does_not_depend_on_the_sequence():
    assert tree_decode_elements(1, 4096, 32, 64) == 2 * math.log2(64) * (4096 + 64)
    assert tree_decode_elements(1, 4096, 32, 1) == 0.0
