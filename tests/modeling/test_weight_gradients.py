"""Input gradients and weight gradients apart are the gradients of one backward pass, bit for bit."""

from __future__ import annotations

import gc
import weakref

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from stagewright.modeling.absent_output import TensorShape, output_structure  # noqa: E402
from stagewright.modeling.weight_gradients import (  # noqa: E402
    WeightGradientSink,
    defer_weight_gradients,
    run_queue,
)


def models():
    return {
        "linear": (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)), torch.randn(3, 7, 6)),
        "in-place": (nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)), torch.randn(3, 7, 6)),
        "norm": (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6)), torch.randn(3, 6)),
        "convolution": (
            nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2)),
            torch.randn(2, 3, 9, 9),
        ),
        "attention": (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(2, 5, 8)),
    }


def gradients(model, inputs, run):
    model.zero_grad()
    leaf = inputs.clone().requires_grad_()
    run(model, leaf)
    return {"input": leaf.grad, **{name: value.grad for name, value in model.named_parameters()}}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["linear", "in-place", "norm", "convolution", "attention"])
def test_deferred_weight_gradients_are_those_of_autograd(name, recomputed):
    torch.manual_seed(0)
    model, inputs = models()[name]
    expected = gradients(model, inputs, lambda module, leaf: module(leaf).square().sum().backward())
    sink = WeightGradientSink()
    assert defer_weight_gradients(model, sink) > 0

    def run(module, leaf):
        output = checkpoint(module, leaf, use_reentrant=False) if recomputed else module(leaf)
        with sink.collect() as queue:
            output.square().sum().backward()
        assert leaf.grad is not None
        deferred = [value.grad for value in module.parameters() if value.grad is None]
        assert deferred
        run_queue(queue)

    for key, value in gradients(model, inputs, run).items():
        assert torch.equal(value, expected[key]), key


def test_a_norms_gradient_is_made_with_its_input_gradient():
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6))
    sink = WeightGradientSink()
    assert defer_weight_gradients(model, sink) == 1
    with sink.collect() as queue:
        model(torch.randn(3, 6)).sum().backward()
    missing = [name for name, value in model.named_parameters() if value.grad is None]
    assert len(queue) == 1 and missing == ["1.weight", "1.bias"]


def test_what_waits_does_not_hold_what_the_model_was_given():
    """The graph of a waiting operand would: it ends at the model's input, here a norm's."""
    model, sink = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)), WeightGradientSink()
    defer_weight_gradients(model, sink)
    inputs = torch.randn(3, 6).requires_grad_()
    with sink.collect() as queue:
        model(inputs).sum().backward()
    given = weakref.ref(inputs)
    del inputs
    gc.collect()
    assert len(queue) == 1 and given() is None


def test_without_a_collecting_queue_the_gradients_are_computed_at_once():
    torch.manual_seed(0)
    model, inputs = models()["linear"]
    expected = gradients(model, inputs, lambda module, leaf: module(leaf).sum().backward())
    defer_weight_gradients(model, WeightGradientSink())
    found = gradients(model, inputs, lambda module, leaf: module(leaf).sum().backward())
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


def test_inputs_may_be_named():
    module = nn.Sequential(nn.Linear(3, 3), nn.Conv2d(1, 1, 1))
    defer_weight_gradients(module, WeightGradientSink())
    assert module[0](input=torch.ones(2, 3)).shape == (2, 3)
    assert module[1](input=torch.ones(1, 1, 2, 2)).shape == (1, 1, 2, 2)


def test_two_microbatches_accumulate():
    torch.manual_seed(0)
    model, inputs = models()["linear"]
    expected = gradients(
        model, inputs, lambda module, leaf: (module(leaf[:1]).sum().backward(), module(leaf[1:]).sum().backward())
    )
    sink = WeightGradientSink()
    defer_weight_gradients(model, sink)

    def run(module, leaf):
        queues = []
        for part in (leaf[:1], leaf[1:]):
            with sink.collect() as queue:
                module(part).sum().backward()
            queues.append(queue)
        for queue in queues:
            run_queue(queue)

    for key, value in gradients(model, inputs, run).items():
        assert torch.allclose(value, expected[key], rtol=1e-6), key


class CountedProducts(TorchDispatchMode):
    """Counts the matrix products within."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("deferred", [False, True])
def test_a_recomputation_is_spared_the_last_product(deferred):
    """Three layers: two products again, and one input gradient for each; the third output is needed by nobody."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    sink = WeightGradientSink()
    if deferred:
        defer_weight_gradients(model, sink)
    output = checkpoint(model, torch.randn(3, 4, requires_grad=True), use_reentrant=False)
    with CountedProducts() as products, sink.collect() as queue:
        output.sum().backward()
    assert products.count == 2 + 3 + (0 if deferred else 3)
    assert len(queue) == (3 if deferred else 0)


def test_an_absent_layer_with_deferred_gradients_still_tells_the_structure_of_its_output():
    """It is run on the meta device, which has no autocast to ask for."""
    layer = nn.Linear(6, 5)
    defer_weight_gradients(layer, WeightGradientSink())
    assert output_structure(layer, (torch.randn(3, 6),), {}) == TensorShape((3, 5), torch.float32)
