"""What the mocked factories promise, on numbers a hand can check."""

import pytest

from stagewright.planner.documents import ModelProfile, Recompute, Source
from stagewright.planner.errors import InvalidArgument
from stagewright.testing import cluster_factory, mixed_cluster_factory
from stagewright.testing import profile_factory as make_profile


def test_equal_layers_are_declared_once(profile_factory):
    profile = profile_factory(5)
    assert [(run.name, run.count) for run in profile.layers] == [("layer.{}", 5)]
    assert profile.layer_names == ("layer.0", "layer.1", "layer.2", "layer.3", "layer.4")


def test_seconds_and_bytes_scale_with_microbatch_over_tensor_degree():
    profile = make_profile(
        2, forward_s=3.0, activation_bytes=8.0, output_bytes=4.0, microbatches=(6,), tensor_degrees=(2,)
    )
    (cost,) = profile.classes[profile.layer_classes[0]].costs
    assert (cost.forward_s, cost.activation_bytes[Recompute.NONE], cost.output_bytes) == (9.0, 24.0, 24.0)
    assert [item.payload_bytes for item in cost.collectives] == [24.0, 24.0]
    assert cost.source is Source.MOCKED


def test_full_recomputation_keeps_the_input_of_the_layer():
    profile = make_profile(output_bytes=[1.0, 2.0, 4.0], activation_bytes=100.0, microbatches=(1,))
    kept = [profile.classes[name].costs[0].activation_bytes[Recompute.FULL] for name in profile.layer_classes]
    assert kept == [1.0, 1.0, 2.0]


def test_sequences_give_each_layer_its_value_and_equal_ones_share_a_class():
    profile = make_profile(forward_s=[1.0, 2.0, 2.0, 2.0, 1.0])
    assert [run.count for run in profile.layers] == [1, 3, 1]
    assert profile.layer_classes[0] == profile.layer_classes[4]


def test_jitter_is_seeded_and_bounded():
    first, second, other = (make_profile(20, jitter=0.1, seed=seed) for seed in (1, 1, 2))
    assert first.digest == second.digest != other.digest
    seconds = [value.costs[0].forward_s for value in first.classes.values()]
    assert len(set(seconds)) == 20
    assert all(0.9e-3 <= value <= 1.1e-3 for value in seconds)


def test_tied_layers_count_their_parameters_once():
    assert make_profile(3, parameters=10, tied=[(0, 2)]).num_parameters == 20


def test_lengths_that_differ_are_refused_with_both_numbers():
    with pytest.raises(InvalidArgument, match="forward_s has 2 values, the profile 3 layers"):
        make_profile(3, forward_s=[1.0, 2.0])


def test_a_profile_survives_its_json():
    profile = make_profile(3, edges=[(0, 1), (0, 2), (1, 2)], forward_s=[1.0, 2.0, 3.0])
    assert ModelProfile.model_validate_json(profile.canonical_json()).digest == profile.digest


def test_a_cluster_of_one_node_has_one_link_level_and_of_two_nodes_two(cluster_factory):
    assert [level.num_devices for level in cluster_factory(4).groups[0].links] == [4]
    assert [level.num_devices for level in cluster_factory(4, 2).groups[0].links] == [4, 8]


def test_a_mixed_cluster_numbers_devices_group_by_group():
    cluster = mixed_cluster_factory([cluster_factory(2, name="big"), cluster_factory(3, name="small")])
    assert [cluster.group_of(index).name for index in range(5)] == ["big-0", "big-0", "small-1", "small-1", "small-1"]
