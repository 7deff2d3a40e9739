"""The cost model's table: measured first, interpolated inside the grid, analytic otherwise; what is legal."""

import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.cost import CostModel, CostOptions
from stagewright.planner.documents import (
    Collective,
    ConfigurationCost,
    Degrees,
    LayerClass,
    LayerRun,
    ModelProfile,
    Recompute,
    Source,
    TrainingJob,
)
from stagewright.planner.documents.cluster import EfficiencyPoint
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.models.hugging_face import profile_from_config

A100 = "a100-sxm-80g:8x2"


def entry(microbatch, seconds, *, length=128, tp=1, **more):
    return ConfigurationCost(
        microbatch=microbatch,
        sequence_length=length,
        tensor_degree=tp,
        forward_s=seconds,
        input_grad_s=1.5 * seconds,
        weight_grad_s=seconds,
        activation_bytes={Recompute.NONE: 1000.0 * microbatch, Recompute.FULL: 100.0 * microbatch},
        output_bytes=100.0 * microbatch,
        workspace_bytes=50.0,
        source=Source.MEASURED,
        **more,
    )


def profile(*entries, operators=()):
    layer = LayerClass(kind="block", parameters=1000, replicated_parameters=200, costs=entries, operators=operators)
    return ModelProfile(
        name="measured",
        dtype="bf16",
        layers=(LayerRun(name="blocks.{}", layer_class="block", count=3),),
        classes={"block": layer},
    )


def model(found, length=128, cluster=A100, options=None, **job):
    job = {"global_batch": 64, "sequence_length": length, **job}
    return CostModel(found, resolve_cluster(cluster), TrainingJob(**job), options or CostOptions())


def test_a_measured_configuration_is_taken_as_it_is():
    table = model(profile(entry(1, 1.0), entry(4, 3.0))).table(Degrees(), 4)
    assert table.source is Source.MEASURED
    assert list(table.forward_s) == [3.0] * 3
    assert list(table.weight_grad_s) == [3.0] * 3
    assert list(table.input_grad_s) == [4.5] * 3
    assert list(table.activation_bytes[0]) == [4000.0] * 3
    assert list(table.activation_bytes[1]) == [4000.0] * 3, "selective was not measured: it keeps what none keeps"
    assert list(table.activation_bytes[2]) == [400.0] * 3
    assert list(table.recompute_s[2]) == [3.0] * 3, "full repeats the forward where its time was not measured"


def test_between_measured_microbatches_numbers_are_interpolated_and_called_fitted():
    table = model(profile(entry(1, 1.0), entry(4, 3.0))).table(Degrees(), 2)
    assert table.source is Source.FITTED
    assert table.forward_s[0] == pytest.approx(1.0 + 2.0 / 3)
    assert table.activation_bytes[0, 0] == pytest.approx(2000.0)


def test_between_measured_lengths_too():
    table = model(profile(entry(1, 1.0), entry(1, 5.0, length=256)), length=192).table(Degrees(), 1)
    assert table.forward_s[0] == pytest.approx(3.0)


def test_outside_the_grid_nothing_is_guessed():
    measured = model(profile(entry(1, 1.0), entry(4, 3.0)))
    reason = measured.legality(Degrees(), 8)
    assert "was not measured at microbatch 8" in reason
    assert "1/128/1, 4/128/1" in reason
    assert "tensor degree 2" in measured.legality(Degrees(tp=2), 1)
    with pytest.raises(InvalidArgument, match="was not measured"):
        measured.table(Degrees(), 8)


def test_operators_answer_where_nothing_was_measured():
    operators = resolve_model("gpt2").classes["block"].operators
    found = model(profile(entry(1, 1.0), operators=operators))
    assert found.table(Degrees(), 1).source is Source.MEASURED
    assert found.table(Degrees(), 2).source is Source.ANALYTIC


def test_sequence_parallelism_splits_what_measured_shards_hold_alike():
    """16 units of bsh, 12 of them split by 2: 10 are held, of the 4 copied 2 are inputs of columns, whole; 1 is spared.

    The example GPT on two ranks holds exactly that much less: 50,009,320 bytes where 50,009,096 are predicted.
    """
    whole, shard = entry(1, 1.0), entry(1, 0.5, tp=2, collectives=(sums(), sums("backward")))
    whole = whole.model_copy(update={"activation_bytes": {Recompute.NONE: 1600.0, Recompute.FULL: 100.0}})
    shard = shard.model_copy(update={"activation_bytes": {Recompute.NONE: 1000.0, Recompute.FULL: 100.0}})
    found = model(profile(whole, shard))
    plain, split = (found.table(Degrees(tp=2, sp=sp), 1) for sp in (False, True))
    assert plain.activation_bytes[:, 0].tolist() == [1000.0, 1000.0, 100.0]
    assert split.activation_bytes[:, 0].tolist() == [900.0, 900.0, 50.0]
    assert (plain.output_bytes[0], split.output_bytes[0]) == (100.0, 50.0)
    assert {name: sent[0] for name, sent in plain.link_bytes.items()} == {"all-reduce/tp": 400.0}
    assert {name: sent[0] for name, sent in split.link_bytes.items()} == {
        "reduce-scatter/tp": 200.0,
        "all-gather/tp": 200.0,
    }
    assert split.source is Source.FITTED


def sums(phase="forward", payload_bytes=100.0, count=2, **more):
    return Collective(phase=phase, operation="all-reduce", group="tp", payload_bytes=payload_bytes, count=count, **more)


@pytest.mark.parametrize(("count_again", "repeated"), [(None, 1), (0, 0), (2, 2)])
def test_full_recomputation_sends_again_what_was_counted_or_else_all_but_the_last_sum(count_again, repeated):
    """With a norm behind attention and feed-forward (OLMo 2) both sums are sent again; 16 % were missing at tp 2."""
    found = model(profile(entry(1, 1.0, tp=2, collectives=(sums(count_again=count_again), sums("backward")))))
    plain, split = (found.table(Degrees(tp=2, sp=sp), 1).again_link_bytes for sp in (False, True))
    assert plain.get("all-reduce/tp", [0.0])[0] == 100.0 * repeated
    assert split.get("reduce-scatter/tp", [0.0])[0] == 50.0 * repeated
    assert split["all-gather/tp"][0] == 50.0 * 2, "both entrances of columns"


def test_what_a_measured_layer_adds_up_of_the_vocabulary_is_sent_where_that_is_split():
    """A decoder that is one layer has an embedding of its own, which stays a sum under sequence parallelism."""
    collectives = (sums(), sums(count=1, of_vocabulary=True))
    found = model(profile(entry(1, 1.0, tp=2, collectives=collectives)))
    sent = [
        found.table(Degrees(tp=2, vocab_parallel=vocabulary, sp=sp), 1).link_bytes.get("all-reduce/tp", [0.0])[0]
        for sp in (False, True)
        for vocabulary in (False, True)
    ]
    assert sent == [200.0, 300.0, 0.0, 100.0]


def test_an_embedding_inside_a_measured_layer_is_whole_where_the_vocabulary_is():
    """1,000 parameters, 200 of them whole, 100 of the vocabulary."""
    known = profile(entry(1, 1.0, tp=2))
    classes = {name: layer.model_copy(update={"vocabulary_parameters": 100}) for name, layer in known.classes.items()}
    found = model(known.model_copy(update={"classes": classes}))
    tables = (found.table(Degrees(tp=2, vocab_parallel=split), 1) for split in (False, True))
    assert [table.dense_parameters[0] for table in tables] == [300 + 700 / 2, 200 + 800 / 2]


def test_context_parallelism_divides_the_sums_of_a_measured_layer():
    found = model(profile(entry(1, 1.0, tp=2, collectives=(sums(),))))
    whole, part = (found.table(Degrees(tp=2, cp=cp), 1).link_bytes["all-reduce/tp"][0] for cp in (1, 2))
    assert part == whole / 2


def test_sequence_parallelism_splits_the_hidden_state_that_a_measured_layer_passes_on_and_no_more():
    """Blocks of T5 pass on a bias of positions too, here 40 of 100 bytes."""
    known = entry(1, 1.0, tp=2, collectives=(sums(payload_bytes=60.0),), unkept_input_bytes=40.0)
    table = model(profile(known)).table(Degrees(tp=2, sp=True), 1)
    assert table.output_bytes[0] == 60.0 / 2 + 40.0


def test_whole_experts_of_a_shard_run_on_all_tokens_and_under_sequence_parallelism_on_its_own():
    """A second of dense work and one of experts: half of the one, and with a part of the sequence half of both."""
    known = profile(entry(1, 2.0), entry(1, 1.5, tp=2))
    classes = {name: layer.model_copy(update={"expert_parameters": 400}) for name, layer in known.classes.items()}
    found = model(known.model_copy(update={"classes": classes}))
    plain, split = (found.table(Degrees(tp=2, sp=sp), 1) for sp in (False, True))
    assert (plain.forward_s[0], split.forward_s[0]) == (1.5, 1.0)
    assert plain.expert_parameters[0] == split.expert_parameters[0] == 400


def test_measured_collectives_are_priced_on_the_links_of_the_group():
    collectives = (Collective(phase="forward", operation="all-reduce", group="tp", payload_bytes=64e6, count=2),)
    found = model(profile(entry(1, 1.0, tp=2, collectives=collectives)))
    table = found.table(Degrees(tp=2), 1)
    assert table.forward_s[0] > 1.0
    assert table.link_bytes["all-reduce/tp"][0] == 2 * 64e6
    assert table.dense_parameters[0] == 200 + 800 / 2


def test_context_parallelism_of_a_measured_layer_is_a_share_and_fitted():
    table = model(profile(entry(1, 1.0))).table(Degrees(cp=2), 1)
    assert table.source is Source.FITTED
    assert table.forward_s[0] == 0.5
    assert table.activation_bytes[0, 0] == 500.0


def llama(name="llama3.1-8b", length=4096, cluster="h100-sxm:8x4", **job):
    return model(resolve_model(name), length, cluster, **job)


@pytest.mark.parametrize(
    ("degrees", "microbatch", "text"),
    [
        (Degrees(dp=3), 1, "global batch 64 does not divide by dp * microbatch = 3 * 1"),
        (Degrees(), 3, "3 = 3"),
        (Degrees(dp=64), 1, "= 64 devices, the cluster has 32"),
        (Degrees(tp=3), 1, "32 attention heads do not divide by tp 3"),
        (Degrees(tp=1, sp=True), 1, "needs tp above 1"),
        (Degrees(cp=3), 1, "sequence length 4096 does not divide by cp 3"),
        (Degrees(cp=16, ulysses=16), 1, "ulysses 16 needs to divide the 32 heads and 8 key-value heads"),
        (Degrees(dp=2, ep=2), 1, "the model has no experts, ep is 2"),
    ],
)
def test_illegal_degrees_are_refused_with_both_numbers(degrees, microbatch, text):
    assert text in llama().legality(degrees, microbatch)


def test_keys_and_values_may_be_fewer_than_the_tensor_degree():
    found = llama("llama3.1-8b", cluster="h100-sxm:16x2")
    assert found.legality(Degrees(tp=16, vocab_parallel=True), 1) is None
    wide, narrow = found.table(Degrees(tp=16), 1), found.table(Degrees(tp=8), 1)
    assert wide.dense_parameters[1] > narrow.dense_parameters[1] / 2, "key-value projections are replicated"


@pytest.mark.parametrize(
    ("config", "tp"),
    [
        ({"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 8, "multi_query": True}, 2),
        ({"model_type": "phi3", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}, 4),
    ],
)
def test_keys_and_values_in_one_projection_with_queries_are_held_once(config, tp):
    sizes = {"num_hidden_layers": 2, "vocab_size": 128, "intermediate_size": 128, "max_position_embeddings": 64}
    found = model(profile_from_config({**sizes, **config}, "small"), 64)
    assert f"key-value heads do not divide by tp {tp}: one projection" in found.legality(Degrees(tp=tp), 1)
    assert found.legality(Degrees(tp=tp // 2), 1) is None


def test_experts_are_divided_only_as_far_as_a_run_can():
    all_in_one = model(resolve_model("dbrx"), 1024)
    assert "all experts lie in the same tensors" in all_in_one.legality(Degrees(dp=2, ep=2), 1)
    assert "all experts lie in the same tensors" in all_in_one.legality(Degrees(dp=2, etp=2), 1)
    with_biases = model(resolve_model("gpt-oss-20b"), 1024)
    assert "each expert adds a bias to its output" in with_biases.legality(Degrees(dp=2, etp=2), 1)
    assert with_biases.legality(Degrees(dp=2, ep=2), 1) is None


def test_an_image_whose_tokens_do_not_divide_is_not_split_along_them():
    found = model(resolve_model("vit-l-16"), 1024)
    assert "the 197 tokens of layer class 'block' do not divide by tp 2" in found.legality(Degrees(tp=2, sp=True), 1)
    assert found.legality(Degrees(tp=2), 1) is None


def test_a_vocabulary_that_does_not_divide_names_the_padded_one():
    reason = model(resolve_model("gpt2"), 1024).legality(Degrees(tp=2, vocab_parallel=True), 1)
    assert "vocabulary 50257 does not divide by tp 2; pad it to 50432" in reason
    assert model(resolve_model("gpt2"), 1024).legality(Degrees(tp=2), 1) is None


def test_experts_must_divide_by_their_degrees():
    found = llama("mixtral-8x7b")
    assert found.legality(Degrees(dp=8, ep=8), 1) is None
    assert "8 experts do not divide by ep 16" in found.legality(Degrees(dp=16, ep=16), 1)
    uneven = Degrees(cp=3, etp=3)
    assert "14336 does not divide by etp 3" in llama("mixtral-8x7b", length=3 * 1024).legality(uneven, 1)


def test_layers_with_other_numbers_of_experts_are_checked_one_by_one():
    base = resolve_model("mixtral-8x7b")
    block = base.classes["expert_block"]
    fewer = block.model_copy(
        update={
            "operators": tuple(
                operator.model_copy(update={"num_groups": 2}) if operator.num_groups > 1 else operator
                for operator in block.operators
            )
        }
    )
    pyramid = base.model_copy(update={"classes": {**base.classes, "expert_block": fewer}})
    reason = model(pyramid, 4096, "h100-sxm:8x4").legality(Degrees(dp=4, ep=4), 1)
    assert "the 2 experts of layer class 'expert_block' do not divide by ep 4" in reason


def test_expert_parallelism_moves_two_k_bsh_each_way_and_divides_the_experts():
    found = llama("mixtral-8x7b")
    alone, split = found.table(Degrees(dp=8), 1), found.table(Degrees(dp=8, ep=8), 1)
    assert split.expert_parameters[1] == pytest.approx(alone.expert_parameters[1] / 8)
    assert split.dense_parameters[1] == alone.dense_parameters[1]
    tokens, hidden = 4096, 4096
    expected = 2 * (2 * 2 * tokens * hidden * 7 / 8) * 2
    assert split.link_bytes["all-to-all/ep"][1] == pytest.approx(expected)
    assert split.forward_s[1] > 0


def test_imbalance_and_capacity_scale_the_exchange():
    even = llama("mixtral-8x7b").table(Degrees(dp=8, ep=8), 1)
    skewed = llama("mixtral-8x7b", expert_imbalance=1.5).table(Degrees(dp=8, ep=8), 1)
    assert skewed.link_bytes["all-to-all/ep"][1] == pytest.approx(1.5 * even.link_bytes["all-to-all/ep"][1])
    assert skewed.forward_s[1] > even.forward_s[1]
    limited = model(resolve_model("mixtral-8x7b"), 4096, "h100-sxm:8x4", CostOptions(expert_capacity=1.25)).table(
        Degrees(dp=8, ep=8), 1
    )
    assert limited.link_bytes["all-to-all/ep"][1] == pytest.approx(1.25 * even.link_bytes["all-to-all/ep"][1])


def test_attention_and_experts_may_use_the_devices_in_different_shapes():
    found = llama("mixtral-8x7b")
    degrees = Degrees(dp=4, tp=2, sp=True, ep=8)
    assert found.legality(degrees, 1) is None
    table = found.table(degrees, 1)
    plain = found.table(Degrees(dp=4, tp=2, sp=True), 1)
    assert table.expert_parameters[1] == pytest.approx(plain.expert_parameters[1] / 8)
    assert table.dense_parameters[1] == plain.dense_parameters[1]


def test_context_parallelism_moves_keys_and_values_round_and_heads_inside():
    found = llama("llama3.1-8b", length=32768)
    ring = found.table(Degrees(cp=4), 1)
    tokens, kv = 32768 / 4, 2 * 8 * 128
    assert ring.link_bytes["send-receive/cp"][1] == pytest.approx(3 * 3 * tokens * kv * 2)
    heads = found.table(Degrees(cp=4, ulysses=4), 1)
    assert "send-receive/cp" not in heads.link_bytes
    assert heads.link_bytes["all-to-all/cp"][1] == pytest.approx(
        2 * 3 / 4 * (2 * tokens * 4096 * 2 + 2 * tokens * kv / 2 * 2)
    )
    assert heads.activation_bytes[0, 1] == pytest.approx(ring.activation_bytes[0, 1])


def test_zero_three_gathers_each_microbatch_unless_compute_hides_it():
    found = llama()
    hidden = found.replica_table(Degrees(dp=8, zero=3), 4)
    assert (hidden.forward_s[1:-3] == 0).all()
    eager = model(resolve_model("llama3.1-8b"), 4096, "h100-sxm:8x4", CostOptions(prefetch=False))
    assert (eager.replica_table(Degrees(dp=8, zero=3), 4).forward_s[1:-3] > 0).all()
    assert (found.replica_table(Degrees(dp=8, zero=0), 4).forward_s == 0).all()


def test_the_optimizer_step_is_divided_by_zero():
    found = llama()
    whole = found.replica_table(Degrees(dp=8), 1).optimizer_s
    for zero in (1, 2, 3):
        assert found.replica_table(Degrees(dp=8, zero=zero), 1).optimizer_s == pytest.approx(whole / 8)


def test_overlapped_reduction_leaves_one_bucket():
    plain = llama()
    overlapped = model(resolve_model("llama3.1-8b"), 4096, "h100-sxm:8x4", CostOptions(gradient_overlap=True))
    all_of_it = plain.gradient_sync_s(1e9, 0.0, Degrees(dp=8), backward_s=10.0)
    left = overlapped.gradient_sync_s(1e9, 0.0, Degrees(dp=8), backward_s=10.0)
    assert left < all_of_it / 50
    assert overlapped.gradient_sync_s(1e9, 0.0, Degrees(dp=8), backward_s=0.0) == pytest.approx(all_of_it)


def test_a_boundary_takes_the_slowest_link_and_scatters_over_the_tensor_group():
    found = llama(cluster="h100-sxm:8x4")
    inside = found.boundary(Degrees(tp=2, sp=True), 0, 1)
    across = found.boundary(Degrees(tp=8, sp=True), 0, 1)
    links = found.cluster.groups[0].links
    assert inside.bytes_per_s == links[0].bytes_per_s * links[0].achieved_share
    assert across.bytes_per_s == links[1].bytes_per_s * links[1].achieved_share
    scattered = found.boundary(Degrees(tp=8), 0, 1)
    assert scattered.bytes_per_s > 4 * across.bytes_per_s
    assert found.boundary(Degrees(), 2, 2).seconds(1e9) == 0.0


def test_faster_curves_make_faster_layers():
    found = llama()
    group = found.cluster.groups[0]
    perfect = group.device.model_copy(update={"matmul_efficiency": (EfficiencyPoint(size=1.0, share=1.0),)})
    cluster = found.cluster.model_copy(update={"groups": (group.model_copy(update={"device": perfect}),)})
    better = CostModel(found.profile, cluster, found.job)
    assert better.table(Degrees(), 1).forward_s[1] < found.table(Degrees(), 1).forward_s[1]


def test_an_unknown_group_is_refused_with_the_known_ones():
    with pytest.raises(InvalidArgument) as error:
        llama().table(Degrees(), 1, group="nowhere")
    assert "h100-sxm" in error.value.hint


def test_each_group_of_a_mixed_cluster_has_its_own_speed():
    found = llama(cluster="h100-sxm:8x2+a100-sxm-80g:8x2")
    fast, slow = (found.table(Degrees(), 1, group=name) for name in ("h100-sxm", "a100-sxm-80g"))
    assert fast.forward_s[1] < slow.forward_s[1]
    assert fast.activation_bytes[0, 1] == slow.activation_bytes[0, 1]


def test_a_weight_shared_by_two_pipeline_ranks_is_summed_between_them():
    gpt = model(resolve_model("gpt2"), 1024)
    assert gpt.tied_sync_s(Degrees(tp=8), 0, 1) > 0
    assert llama().tied_sync_s(Degrees(), 0, 1) == 0.0


def test_chunks_of_tokens_hide_the_exchange_behind_the_experts():
    def forward(chunks):
        options = CostOptions(expert_chunks=chunks)
        table = model(resolve_model("mixtral-8x7b"), 4096, "h100-sxm:8x4", options).table(Degrees(dp=8, ep=8), 1)
        return float(table.forward_s[1]), float(table.link_bytes["all-to-all/ep"][1])

    (one, sent), (two, same), (eight, _) = forward(1), forward(2), forward(8)
    assert one > two >= eight
    assert sent == same


def test_compute_slows_down_while_a_hidden_collective_runs():
    base = llama("llama3.1-8b", length=32768)
    group = base.cluster.groups[0]
    links = tuple(level.model_copy(update={"overlap_slowdown": 1.2}) for level in group.links)
    slow = base.cluster.model_copy(update={"groups": (group.model_copy(update={"links": links}),)})
    degrees = Degrees(cp=4)
    plain, slowed = base.table(degrees, 1), CostModel(base.profile, slow, base.job).table(degrees, 1)
    assert slowed.forward_s[1] > plain.forward_s[1]
    assert slowed.forward_s[0] == plain.forward_s[0]
