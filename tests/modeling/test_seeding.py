"""Seeds of layers give the random numbers of torch's own seeding."""

import pytest

torch = pytest.importorskip("torch")

from stagewright.modeling.seeding import layer_seed, seed_layer  # noqa: E402


def test_a_seeded_layer_draws_what_torchs_own_seed_gives():
    torch.manual_seed(layer_seed(5, 3))
    expected = torch.rand(7)
    seed_layer(5, 3)
    assert torch.equal(torch.rand(7), expected)
