"""One transformer layer under tensor parallelism: the oracles O18 and O19, and the cost table around them."""

import numpy as np
import pytest

from stagewright.planner.catalog import resolve_cluster
from stagewright.planner.cost import LEVELS, CostModel, CostOptions
from stagewright.planner.documents import Degrees, Recompute, Source, TrainingJob
from stagewright.planner.models.hugging_face import profile_from_config

MIB = 2.0**20
S, H, A = 2048, 4096, 32
NONE, SELECTIVE, FULL = range(3)


def gpt(hidden=H, heads=A, layers=2, kernel="materialised"):
    config = {
        "model_type": "megatron_gpt",
        "n_embd": hidden,
        "n_head": heads,
        "n_layer": layers,
        "n_positions": S,
        "vocab_size": 51200,
        "attention_kernel": kernel,
    }
    return profile_from_config(config, "gpt")


def model(profile=None, cluster="a100-sxm-80g:8x2", batch=64, options=None, **job):
    return CostModel(
        profile or gpt(),
        resolve_cluster(cluster),
        TrainingJob(global_batch=batch, sequence_length=S, **job),
        options or CostOptions(),
    )


def block(table, name, level=NONE):
    values = getattr(table, name)
    return float(values[level, 1] if values.ndim == 2 else values[1])


@pytest.mark.parametrize(
    ("tp", "sp", "level", "mib"),
    [
        (1, False, NONE, 912),
        (8, False, NONE, 184),
        (8, True, NONE, 114),
        (8, True, SELECTIVE, 34),
        (1, False, FULL, 16),
    ],
)
def test_activations_of_a_transformer_layer(tp, sp, level, mib):
    table = model().table(Degrees(tp=tp, sp=sp), 1)
    assert block(table, "activation_bytes", level) == mib * MIB


def test_activations_are_the_formulas_of_korthikanti_for_any_shape():
    for hidden, heads, b, t in ((1024, 16, 3, 2), (6144, 64, 4, 8), (2304, 24, 1, 4)):
        sbh, ratio = S * b * hidden, 5 * heads * S / hidden
        cost = model(gpt(hidden, heads), batch=b)
        plain, split = cost.table(Degrees(tp=t), b), cost.table(Degrees(tp=t, sp=True), b)
        assert block(plain, "activation_bytes") == pytest.approx(sbh * (10 + 24 / t + ratio / t))
        assert block(split, "activation_bytes") == pytest.approx(sbh / t * (34 + ratio))
        assert block(plain, "activation_bytes", SELECTIVE) == pytest.approx(sbh * (10 + 24 / t))
        assert block(split, "activation_bytes", SELECTIVE) == pytest.approx(34 * sbh / t)


def test_fused_attention_keeps_no_scores():
    table = model(gpt(kernel="fused")).table(Degrees(), 1)
    assert block(table, "activation_bytes") < 35 * S * H
    double = CostModel(
        gpt(kernel="fused"), resolve_cluster("a100-sxm-80g:8x1"), TrainingJob(global_batch=1, sequence_length=2 * S)
    )
    assert block(double.table(Degrees(), 1), "activation_bytes") == pytest.approx(2 * block(table, "activation_bytes"))


def test_tensor_parallelism_sends_ninety_six_mebibytes_a_layer():
    cost = model()
    plain = cost.table(Degrees(tp=4), 1)
    assert plain.link_bytes["all-reduce/tp"][1] == 96 * MIB
    split = cost.table(Degrees(tp=4, sp=True), 1)
    assert split.link_bytes["all-gather/tp"][1] + split.link_bytes["reduce-scatter/tp"][1] == 96 * MIB
    assert "all-reduce/tp" not in split.link_bytes


def test_full_recomputation_repeats_the_forwards_two_all_reduces():
    # 8 (t-1)/t bsh without, 12 (t-1)/t bsh = 144 MiB with it: the added time holds half of the layer's communication.
    cost = model(options=CostOptions())
    table = cost.table(Degrees(tp=4), 1)
    assert block(table, "recompute_s", FULL) == block(table, "forward_s")
    forward_bytes = table.link_bytes["all-reduce/tp"][1] / 2
    assert table.link_bytes["all-reduce/tp"][1] + forward_bytes == 144 * MIB


def test_selective_recomputation_adds_four_b_s_s_h_flops():
    h = H
    layer = gpt().classes["block"]
    scores = next(op for op in layer.operators if op.name == "attention_scores")
    assert scores.recomputed_by == "selective"
    extra = scores.flops_per_token_per_position * S * S
    assert extra == 4 * S * S * h
    linear = sum(op.flops_per_token for op in layer.operators) * S
    assert linear == 24 * S * h * h
    assert extra / linear == pytest.approx(S / (6 * h))
    assert extra / (3 * (linear + extra)) == pytest.approx(0.026, abs=0.001)


def test_recomputation_only_adds_time_and_only_frees_memory():
    for kernel in ("materialised", "fused"):
        table = model(gpt(kernel=kernel)).table(Degrees(tp=2, sp=True), 2)
        assert (np.diff(table.recompute_s, axis=0) >= 0).all()
        assert (np.diff(table.activation_bytes, axis=0) <= 0).all()
        ends = [0, -2, -1]
        assert (table.recompute_s[:, ends] == 0).all(), "embedding, head and loss are never recomputed"
        assert (table.activation_bytes[FULL, ends] == table.activation_bytes[NONE, ends]).all()


def test_recomputing_needs_the_dropped_tensors_as_workspace():
    table = model().table(Degrees(), 1)
    dropped = block(table, "activation_bytes") - block(table, "activation_bytes", FULL)
    assert block(table, "workspace_bytes", FULL) - block(table, "workspace_bytes") == pytest.approx(dropped)


def test_a_split_vocabulary_divides_embedding_head_and_logits():
    cost = model()
    split, whole = cost.table(Degrees(tp=4, vocab_parallel=True), 1), cost.table(Degrees(tp=4), 1)
    vocabulary = 51200 * H
    assert whole.dense_parameters[0] - split.dense_parameters[0] == pytest.approx(vocabulary * 3 / 4)
    assert split.activation_bytes[NONE, -1] == pytest.approx(whole.activation_bytes[NONE, -1] / 4)
    assert split.forward_s[-2] < whole.forward_s[-2]
    assert split.logits_bytes[-1] == 4 * S * 51200 / 4
    assert (split.logits_bytes[:-1] == 0).all()


def test_parameters_of_a_device_add_up_to_the_model():
    profile = gpt()
    cost = model(profile)
    for t in (1, 2, 4, 8):
        table = cost.table(Degrees(tp=t, vocab_parallel=t > 1), 1)
        split = sum(
            op.parameters
            for name in profile.layer_classes
            for op in profile.classes[name].operators
            if {"tp", "kv", "vocab"} & set(op.split)
        )
        replicated = sum(profile.classes[name].parameters for name in profile.layer_classes) - split
        assert table.dense_parameters.sum() == pytest.approx(split / t + replicated)


def test_model_flops_are_the_published_formula():
    # Narayanan et al. 2021: 72 B s l h^2 (1 + s/6h + V/12lh) for forward and backward without recomputation.
    profile = gpt(layers=3)
    table = model(profile).table(Degrees(), 2)
    expected = 72 * 2 * S * 3 * H**2 * (1 + S / (6 * H) + 51200 / (12 * 3 * H))
    assert 3 * table.model_flops.sum() == pytest.approx(expected, rel=1e-12)


def test_twice_the_microbatch_costs_less_than_twice():
    cost = model()
    one, two = cost.table(Degrees(tp=8, sp=True), 1), cost.table(Degrees(tp=8, sp=True), 2)
    assert block(one, "forward_s") < block(two, "forward_s") < 2 * block(one, "forward_s")
    assert block(two, "activation_bytes") == pytest.approx(2 * block(one, "activation_bytes"))


def test_overlapping_tensor_parallelism_hides_time_and_sends_the_same():
    plain = model().table(Degrees(tp=8, sp=True), 1)
    hidden = model(options=CostOptions(tensor_overlap=0.75)).table(Degrees(tp=8, sp=True), 1)
    assert block(hidden, "forward_s") < block(plain, "forward_s")
    assert hidden.link_bytes["all-gather/tp"][1] == plain.link_bytes["all-gather/tp"][1]


def test_the_dtype_of_the_job_scales_bytes_and_rates():
    narrow, wide = model().table(Degrees(), 1), model(precision="fp32").table(Degrees(), 1)
    assert block(wide, "activation_bytes") == pytest.approx(2 * block(narrow, "activation_bytes"))
    assert block(wide, "forward_s") > 4 * block(narrow, "forward_s")


def test_fp8_halves_product_time_at_most_and_keeps_what_it_kept_in_sixteen_bits():
    cluster = "h100-sxm:8x2"
    half, eighth = (
        model(gpt(kernel="fused"), cluster).table(Degrees(), 4),
        model(gpt(kernel="fused"), cluster, precision="fp8").table(Degrees(), 4),
    )
    assert 0.5 < block(eighth, "forward_s") / block(half, "forward_s") < 0.95
    assert block(eighth, "activation_bytes") <= block(half, "activation_bytes")


def test_everything_analytic_says_so():
    assert model().table(Degrees(), 1).source is Source.ANALYTIC
    assert LEVELS == (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
