"""The probe's seconds follow the work, and the host's theft is read where the system tells it."""

import pytest

pytest.importorskip("torch")
import torch

from stagewright.modeling import speed_probe
from stagewright.modeling.speed_probe import SpeedProbe, stolen_seconds


class Clock:
    """Thread time that goes on by what a product is told to take."""

    def __init__(self, product_s, monkeypatch):
        self.now_s, self.product_s = 0.0, product_s
        monkeypatch.setattr(speed_probe.time, "thread_time", lambda: self.now_s)
        monkeypatch.setattr(speed_probe.torch, "mm", self.multiply)

    def multiply(self, left, right, *, out):
        self.now_s += self.product_s


def test_a_probe_is_the_median_of_its_repetitions(monkeypatch):
    clock = Clock(0.5, monkeypatch)
    probe = SpeedProbe()
    assert probe.seconds() == 8 * 0.5
    times = iter([8.0, 1.0, 2.0])

    def once():
        return next(times)

    monkeypatch.setattr(probe, "_once", once)
    assert probe.seconds() == 2.0
    assert clock.now_s > 0


def test_a_probe_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    SpeedProbe().seconds()
    assert torch.rand(1) == expected


def test_what_the_host_took_is_read_in_seconds(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 0 900 0 0 0 250 0 0\ncpu0 100 0 0 900 0 0 0 250 0 0\n")
    monkeypatch.setattr(speed_probe, "Path", lambda name: stat if name == "/proc/stat" else None)
    monkeypatch.setattr(speed_probe.os, "sysconf", lambda name: 100)
    assert stolen_seconds() == 2.5
    stat.write_text("nothing")
    assert stolen_seconds() == 0.0
