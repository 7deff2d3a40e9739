"""Bytes that a plan of a measured profile sends over the tensor group, counted by hand."""

import pytest

from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.step_time import Choice
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
from stagewright.planner.prediction import with_prediction
from stagewright.testing import cluster_factory

HIDDEN_BYTES, OUTPUT_BYTES, LENGTH, MICROBATCHES, RANKS = 4096.0, 5120.0, 16, 2, 2


def sums(payload_bytes=HIDDEN_BYTES, count=2, phase="forward", **more):
    return Collective(phase=phase, operation="all-reduce", group="tp", payload_bytes=payload_bytes, count=count, **more)


def layer(kind, *collectives):
    costs = tuple(
        ConfigurationCost(
            microbatch=4,
            sequence_length=LENGTH,
            tensor_degree=degree,
            forward_s=1e-3,
            input_grad_s=1e-3,
            weight_grad_s=1e-3,
            activation_bytes={Recompute.NONE: 1000.0},
            output_bytes=OUTPUT_BYTES,
            workspace_bytes=50.0,
            collectives=collectives if degree > 1 else (),
            source=Source.MEASURED,
        )
        for degree in (1, 2)
    )
    return LayerClass(kind=kind, parameters=0, costs=costs)


def sent(classes, order, **degrees):
    """Bytes over all devices of one step of two microbatches on two ranks."""
    found = ModelProfile(
        name="measured",
        dtype="fp32",
        layers=tuple(LayerRun(name=f"layers.{i}", layer_class=name, count=1) for i, name in enumerate(order)),
        classes=classes,
    )
    job = TrainingJob(global_batch=8, sequence_length=LENGTH, precision="fp32")
    choice = Choice(Degrees(tp=2, **degrees), 1, 1, 4, "1f1b", Recompute.NONE)
    plan = even_plan(found, cluster_factory(RANKS, 1), job, choice)
    return with_prediction(plan, found).prediction.link_bytes


def test_each_row_of_blocks_splits_the_hidden_state_and_joins_it_and_nothing_that_goes_beside_it():
    """A gather of gradients where a row begins, one of values behind its end: 1,024 of 5,120 bytes are no hidden state."""
    classes = {"block": layer("block", sums()), "other": layer("other")}
    found = sent(classes, ["other", "block", "block", "other", "block", "other"], sp=True)
    whole = HIDDEN_BYTES * MICROBATCHES  # (ranks - 1) / ranks of it from each of two
    assert found == {"reduce-scatter/tp": 3 * 2 * whole, "all-gather/tp": (3 * 2 + 2 * 2) * whole}


@pytest.mark.parametrize("has_vocabulary", [False, True])
def test_a_loss_sums_over_a_vocabulary_where_the_model_has_one(has_vocabulary):
    """Maximum, sum of exponentials and logit of the target, of four bytes a token each; ViT's labels are whole."""
    loss = layer("loss", *([sums(256.0, 3, of_vocabulary=True)] if has_vocabulary else []))
    found = sent({"block": layer("block", sums()), "loss": loss}, ["block", "loss"], vocab_parallel=True)
    blocks, tokens = 2 * 2 * HIDDEN_BYTES * MICROBATCHES, 8 * LENGTH
    assert found == {"all-reduce/tp": blocks + (2 * 3 * 4 * tokens if has_vocabulary else 0)}
