"""An expert's capacity: who finds room, and how many are dropped."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from stagewright.modeling.expert_capacity import capacity_of, kept_choices, limit_experts  # noqa: E402
from stagewright.planner.errors import InvalidArgument  # noqa: E402


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 4), (1.25, 5), (2.0, 8)])
def test_an_expert_takes_cf_k_tokens_over_experts(factor, expected):
    assert capacity_of(8, 2, 4, factor) == expected


def test_first_choices_find_room_before_second_ones_and_tokens_in_their_order():
    index = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 2]])
    kept = kept_choices(index, 3, 2)
    assert kept.tolist() == [[True, True], [True, False], [True, False], [False, True]]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_dropped_is_what_exceeds_the_capacity(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(64, 8, generator=generator) * torch.rand(8, generator=generator)
    index = scores.topk(2).indices
    capacity = capacity_of(64, 2, 8, 1.0)
    load = torch.bincount(index.reshape(-1), minlength=8)
    kept = kept_choices(index, 8, capacity)
    assert int((~kept).sum()) == int((load - capacity).clamp(min=0).sum())
    assert torch.bincount(index[kept], minlength=8).max() <= capacity


def test_a_model_without_experts_is_refused():
    with pytest.raises(InvalidArgument, match="no experts to limit"):
        limit_experts(torch.nn.Linear(2, 2), 1.0)
