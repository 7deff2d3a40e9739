"""The reference in one process leaves the model as it was."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from runtime_models import VOCABULARY, TinyModel  # noqa: E402

from stagewright.modeling import split  # noqa: E402
from stagewright.modeling.weight_gradients import WeightGradientSink, defer_weight_gradients  # noqa: E402
from stagewright.runtime.optimizers import OptimizerChoice  # noqa: E402
from stagewright.runtime.reference import run_reference  # noqa: E402


def test_the_rank_that_ran_the_reference_defers_as_many_weight_gradients_as_the_others():
    """A head is a layer and a linear map: it was left alone there, and under ZeRO that rank's scatters came in another order."""
    expected = defer_weight_gradients(TinyModel(2), WeightGradientSink())
    chain = split(TinyModel(2))
    before = {name: value.clone() for name, value in chain.model.named_parameters()}
    tokens = torch.randint(VOCABULARY, (4, 8))
    made = run_reference(
        chain,
        [(tokens, tokens)],
        microbatch=2,
        seed=0,
        device=torch.device("cpu"),
        optimizer=OptimizerChoice("sgd", 0.1),
    )
    assert all(made.changes[name].abs().max() > 0 for name in ("head.weight", "norm.weight") if name in made.changes)
    assert all(torch.equal(value, before[name]) for name, value in chain.model.named_parameters())
    assert defer_weight_gradients(chain.model, WeightGradientSink()) == expected


def test_what_looks_at_a_heads_output_sees_it_in_a_stage_that_ends_there_also_after_the_reference():
    """Under ZeRO-3 the rank that ran the reference gathered in another order when its hook stood behind the end."""
    tokens = torch.randint(VOCABULARY, (2, 8))
    for first in (False, True):
        chain, seen = split(TinyModel(2)), []
        whole = chain.segment(0, chain.num_layers)
        if first:
            whole.run((tokens, tokens), seed=0)
        chain.model.head.register_forward_hook(lambda _module, _args, output, seen=seen: seen.append(output.shape))
        values = chain.segment(0, chain.num_layers - 1)((tokens, tokens), {}, seed=0)
        assert seen == [value.shape for value in values[chain.num_layers - 2]]
