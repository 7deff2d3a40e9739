"""Small models that exercise every path of the profiler in little time."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_model_file(tmp_path):
    """A file with a factory `build` and a data factory `data`, for what is named by reference."""
    return _written(tmp_path)


@pytest.fixture(scope="module")
def shared_tiny_model_file(tmp_path_factory):
    """The same file for all tests of a module, none of which may change it."""
    return _written(tmp_path_factory.mktemp("tiny"))


def _written(folder):
    path = folder / "tiny_model.py"
    path.write_text(TINY_MODEL)
    return path


TINY_MODEL = """
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden):
        return hidden + self.down(functional.gelu(self.up(self.norm(hidden))))


class Tiny(nn.Module):
    def __init__(self, width=64, num_blocks=3, vocabulary=32):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(num_blocks)])
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens, targets):
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


def build():
    torch.manual_seed(0)
    return Tiny()


def data(batch_size=4, sequence_length=16):
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(32, (batch_size, sequence_length + 1), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]
"""
