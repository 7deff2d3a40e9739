"""A value that skips layers is found before a plan is made: the layer that takes it cannot begin a stage."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from stagewright.modeling import split  # noqa: E402
from stagewright.profiler.cut_check import refused_layers  # noqa: E402
from stagewright.profiler.model_profile import profile_model  # noqa: E402

UNET = """
import torch
from torch import nn
from torch.nn import functional


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, image, target):
        first = torch.relu(self.down(image))
        last = self.up(torch.relu(self.deep(first)))
        return functional.mse_loss(self.out(torch.cat([first, last], 1)), target)


def data(batch_size=2):
    return (torch.randn(batch_size, 3, 16, 16), torch.randn(batch_size, 3, 16, 16))
"""


def test_a_chain_can_be_cut_at_every_layer():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    assert refused_layers(split(model), (torch.ones(2, 4), torch.tensor([0, 1]))) == {}


def test_a_skip_connection_is_said_in_the_profile_with_the_way_out(tmp_path):
    (tmp_path / "unet.py").write_text(UNET)
    profile = profile_model(f"{tmp_path / 'unet.py'}:UNet", microbatches=(2,), device="cpu", budget_s=0.0)
    assert profile.layer_names == ("down", "deep", "up", "out", "loss")
    (warning,) = [text for text in profile.pedigree.warnings if "no stage can begin" in text]
    assert warning.startswith("no stage can begin at up (layer 'out' uses a value of a layer that another stage holds)")
    assert "stagewright_edges()" in warning
