"""Layers are timed inside the running model: under a clock that counts marks, every layer gets its own."""

import pytest
import torch
from memory_records import memory_record

from stagewright.modeling import load_object, split
from stagewright.profiler.layer_timer import LayerTimer
from stagewright.profiler.measured_layers import configuration_numbers
from stagewright.profiler.model_bench import Configuration, ModelBench
from stagewright.profiler.model_source import ModelSource
from stagewright.profiler.timing import is_stable, spread_of


class CountingClock:
    """Each mark is one second after the one before."""

    def __init__(self):
        self.now = 0

    def mark(self):
        self.now += 1
        return self.now

    def seconds(self, first, second):
        return float(second - first)

    def synchronize(self):
        pass


@pytest.fixture
def chain(tiny_model_file):
    return split(load_object(f"{tiny_model_file}:build")())


@pytest.fixture
def batch():
    tokens = torch.randint(32, (2, 8))
    return (tokens, tokens)


def test_every_layer_is_marked_once_in_forward_and_once_in_backward(chain, batch):
    timer = LayerTimer(chain, CountingClock())
    with timer.hooks:
        times = timer.full(batch)
    assert times.forward_s == (1.0,) * chain.num_layers
    assert times.backward_s == (1.0,) * chain.num_layers


def test_a_flush_between_layers_is_in_no_layers_seconds(chain, batch):
    clock, flushes = CountingClock(), []
    timer = LayerTimer(chain, clock, flush=lambda: flushes.append(clock.mark()))
    with timer.hooks:
        times = timer.full(batch)
    assert times.forward_s == times.backward_s == (1.0,) * chain.num_layers
    assert len(flushes) == 2 * chain.num_layers + 1
    assert times.outside_s == 2.0


def test_input_gradients_leave_no_gradient_in_any_parameter(chain, batch):
    timer = LayerTimer(chain, CountingClock())
    with timer.hooks:
        timer.input_gradients(batch)
    assert all(parameter.grad is None for parameter in chain.model.parameters())


def test_timing_changes_no_gradient(chain, batch):
    timer = LayerTimer(chain, CountingClock())
    with timer.hooks:
        timer.full(batch)
    timed = [parameter.grad.clone() for parameter in chain.model.parameters()]
    chain.model.zero_grad()
    chain.model(*batch).backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(timed, chain.model.parameters(), strict=True))


def test_hooks_are_gone_afterwards(chain, batch):
    timer = LayerTimer(chain, CountingClock())
    with timer.hooks:
        timer.full(batch)
    assert all(not module._forward_hooks for module in chain.model.modules() if module is not chain.model.head)
    clock = timer._clock.now
    chain.model(*batch).backward()
    assert timer._clock.now == clock


def test_deferred_weight_gradients_are_bit_equal_to_fused_ones(tiny_model_file):
    source = ModelSource(f"{tiny_model_file}:build")
    chain = source.split(source.build(device=torch.device("cpu"), dtype=torch.float32))
    bench = ModelBench(source, chain, torch.device("cpu"))
    configuration = Configuration(2, 16)
    for _ in range(2):
        chain.segment(0, chain.num_layers)(bench.batch(configuration))[chain.num_layers - 1][0].backward()
    fused = [parameter.grad.clone() for parameter in chain.model.parameters()]
    chain.model.zero_grad()
    bench.measure(configuration, "split")  # a pair: one backward in one piece, one deferred
    assert all(torch.equal(a, b.grad) for a, b in zip(fused, chain.model.parameters(), strict=True))


def test_a_layer_that_is_linear_itself_defers_its_weight_gradient_too(tiny_model_file):
    source = ModelSource(f"{tiny_model_file}:build")
    chain = source.split(source.build(device=torch.device("cpu"), dtype=torch.float32))
    bench = ModelBench(source, chain, torch.device("cpu"))
    bench.warm_up(Configuration(2, 16))
    held = dict(zip(chain.layer_names, bench.measure(Configuration(2, 16), "split")["held_bytes"], strict=True))
    inputs, gradients = 2 * 16 * 64 * 4, 2 * 16 * 32 * 4
    assert held["head"] == inputs + gradients
    assert held["embedding"] == held["loss"] == 0.0


def test_medians_of_layers_are_scaled_to_the_median_of_their_sum():
    """Two layers disturbed in turn: medians of parts are 1 + 1, the median of the whole is 3."""
    steps = [
        {
            "forward_s": forward, "backward_s": [0.0, 0.0], "optimizer_s": [0.0, 0.0], "outside_s": 0.0,
            "entrance_s": 0.0, "empty_step_s": 0.0, "busy_share": 1.0,
        }
        for forward in ([1.0, 2.0], [2.0, 1.0], [1.0, 1.0], [1.0, 2.0], [2.0, 1.0])
    ]  # fmt: skip
    numbers = configuration_numbers({"step": steps, "memory": [memory_record([0.0, 0.0])]})
    assert sum(layer.forward_s for layer in numbers.layers) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("weight_grad_s", "excess_s"),
    [
        ([2.0, 1.0], [1.0, 0.0]),  # the first layer takes 4 apart and 3 together
        ([2.0, 0.6], [0.6, 0.0]),  # what the second gains apart, 0.4 of 2, is taken from what the first loses
        ([1.0, 1.0], [0.0, 0.0]),
        ([0.5, 0.5], [0.0, 0.0]),
    ],
)
def test_what_split_backwards_take_longer_stands_beside_the_whole_backward(weight_grad_s, excess_s):
    step = {
        "forward_s": [1.0, 1.0], "backward_s": [3.0, 2.0], "optimizer_s": [0.0, 0.0], "outside_s": 0.0,
        "entrance_s": 0.0, "empty_step_s": 0.0, "busy_share": 1.0,
    }  # fmt: skip
    split = {"input_grad_s": [2.0, 1.0], "weight_grad_s": weight_grad_s, "fused_s": 5.0, "held_bytes": [0.0, 0.0]}
    record = memory_record([0.0, 0.0])
    layers = configuration_numbers({"step": [step], "split": [split], "memory": [record]}).layers
    assert [layer.split_excess_s for layer in layers] == pytest.approx(excess_s)
    assert [layer.input_grad_s for layer in layers] == pytest.approx([2.0, 1.0])
    assert [layer.input_grad_s + layer.weight_grad_s for layer in layers] == pytest.approx([3.0, 2.0])


def one_layer(**seconds):
    return {
        **dict.fromkeys(("outside_s", "entrance_s", "empty_step_s"), 0.0),
        "busy_share": 1.0,
        "optimizer_s": [0.0],
        **seconds,
    }


MEMORY = memory_record([0.0])
FAST = one_layer(forward_s=[1.0], backward_s=[2.0], probe_s=1.0)
SLOW = one_layer(forward_s=[1.5], backward_s=[3.0], probe_s=1.5)


def test_an_input_gradient_that_seems_to_take_the_whole_backward_leaves_the_weight_gradient_its_own_share():
    step = one_layer(forward_s=[1.0], backward_s=[2.0])
    split = {"input_grad_s": [2.1], "weight_grad_s": [0.7], "fused_s": 2.0, "held_bytes": [0.0]}
    layer = configuration_numbers({"step": [step], "split": [split], "memory": [MEMORY]}).layers[0]
    assert (layer.input_grad_s, layer.weight_grad_s) == (pytest.approx(1.5), pytest.approx(0.5))


@pytest.mark.parametrize("steps", [[FAST, SLOW, SLOW], [FAST, FAST, SLOW]])
def test_measurements_of_a_machine_that_changes_its_speed_are_brought_to_one(steps):
    numbers = configuration_numbers({"step": steps, "memory": [MEMORY]}, probe_s=1.2)
    assert (numbers.layers[0].forward_s, numbers.layers[0].backward_spread_s) == (
        pytest.approx(1.2),
        pytest.approx((2.4, 2.4)),
    )
    assert numbers.speed_range > 0.2


@pytest.mark.parametrize(
    ("excesses", "believed"),
    [
        ([0.2] * 6, 0.2),
        ([0.0, 0.4] * 3, 0.2 - 1.2533 * 1.4826 * 0.2 / 6**0.5),  # median 0.2, each 0.2 away from it
        ([-0.3, 0.5] * 2, 0.0),  # 0.1 with an error of 0.37
        ([-0.1] * 6, 0.0),
    ],
)
def test_of_what_split_backwards_take_longer_as_much_is_believed_as_pairs_show(excesses, believed):
    """The pairs are made at speeds that differ by a factor of two: only what a pair says of itself counts."""
    pairs = [
        {"input_grad_s": [2.0 * s], "weight_grad_s": [2.0 * s * (1 + 2 * e)], "fused_s": 4.0 * s, "held_bytes": [0.0]}
        for e, s in zip(excesses, [1.0, 2.0, 1.5, 1.0, 2.0, 1.2], strict=False)
    ]
    step = one_layer(forward_s=[1.0], backward_s=[4.0])
    numbers = configuration_numbers({"step": [step], "split": pairs, "memory": [MEMORY]})
    assert numbers.layers[0].split_excess_s == pytest.approx(4.0 * believed)
    assert numbers.split_overhead == pytest.approx(sum(excesses) / len(excesses))


def test_a_layers_optimizer_step_is_that_of_its_own_parameters_less_a_step_of_nothing(tiny_model_file):
    source = ModelSource(f"{tiny_model_file}:build")
    chain = source.split(source.build(device=torch.device("cpu"), dtype=torch.float32))
    bench = ModelBench(source, chain, torch.device("cpu"))
    bench._clock = CountingClock()
    stepped = []
    bench._optimizer.step = lambda: stepped.append([len(group["params"]) for group in bench._optimizer.param_groups])
    whole = len(bench._optimizer.param_groups[0]["params"])
    seconds, empty_s = bench._step()
    sizes = [sum(name in layer.parameters for name, _ in chain.model.named_parameters()) for layer in chain.layers]
    assert stepped == [[0], *([size] for size in sizes if size)]
    assert (seconds, empty_s) == ([0.0] * chain.num_layers, 1.0)
    assert len(bench._optimizer.param_groups[0]["params"]) == whole


def test_samples_are_stable_when_their_halves_agree():
    assert is_stable([9.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert not is_stable([2.0, 2.0, 2.0, 1.0, 1.0, 1.0])
    assert not is_stable([1.0, 1.0])


def test_a_spread_holds_median_and_percentiles():
    spread = spread_of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (spread.median_s, spread.p20_s, spread.p80_s, spread.num_samples) == (3.5, 2.0, 5.0, 6)
    assert spread.relative_width == pytest.approx(3.0 / 3.5)
