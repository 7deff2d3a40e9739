"""WeiPipe passes what is smaller."""

import pytest

from stagewright.planner.cost.weight_passing import activation_pass_elements, passes_weights, weight_pass_elements
from stagewright.planner.errors import InvalidArgument


def test_the_choice_flips_where_both_send_the_same():
    hidden, layers, ranks = 1024, 32, 16
    crossing = 18 * hidden * layers // ranks  # tokens of a microbatch
    assert weight_pass_elements(hidden, layers, ranks) == activation_pass_elements(1, crossing, hidden)
    assert not passes_weights(1, crossing, hidden, num_layers=layers, num_ranks=ranks)
    assert passes_weights(1, crossing + 1, hidden, num_layers=layers, num_ranks=ranks)


def test_long_sequences_favour_weights_and_wide_models_activations():
    assert passes_weights(16, 16384, 1024, num_layers=32, num_ranks=16)
    assert not passes_weights(1, 2048, 12288, num_layers=96, num_ranks=8)
    with pytest.raises(InvalidArgument, match="32 layers of width 1024 on 0 ranks"):
        weight_pass_elements(1024, 32, 0)
