"""The allocator's trace agrees with the accounting of saved tensors: one layer more costs what the layer keeps."""

import gc

import pytest
import torch
from torch import nn

from stagewright.modeling import load_object, split
from stagewright.profiler.memory_trace import layer_workspace_bytes, peak_above_start, trace_spans
from stagewright.profiler.saved_bytes import layer_bytes

CPU = torch.device("cpu")


def model_and_batch(tiny_model_file, num_blocks):
    model = load_object(f"{tiny_model_file}:Tiny")(num_blocks=num_blocks)
    tokens = torch.randint(32, (4, 16))
    model(tokens, tokens).backward()
    return model, (tokens, tokens)


def test_a_second_and_a_third_layer_add_what_a_layer_keeps(tiny_model_file):
    """The difference method: fixed costs cancel between runs of n and n + 1 layers."""
    peaks = []
    for num_blocks in (1, 2, 3):
        model, batch = model_and_batch(tiny_model_file, num_blocks)
        peaks.append(peak_above_start(lambda model=model, batch=batch: model(*batch).backward(), CPU))
    kept = layer_bytes(split(model), batch).saved
    assert peaks[1] - peaks[0] == peaks[2] - peaks[1] == kept[1]


def test_kept_prefix_plus_workspace_is_the_peak(tiny_model_file):
    model, batch = model_and_batch(tiny_model_file, 3)
    chain = split(model)
    kept = layer_bytes(chain, batch).saved
    workspace = layer_workspace_bytes(chain, batch, kept, CPU)
    peak = peak_above_start(lambda: model(*batch).backward(), CPU)
    assert max(sum(kept[: index + 1]) + extra for index, extra in enumerate(workspace)) == peak


def test_garbage_of_earlier_work_does_not_lower_a_peak():
    """A cycle whose tensor was allocated under watch is released at some later collection, perhaps in the next trace."""

    def leave_garbage():
        cycle = {"tensor": torch.zeros(1 << 20)}
        cycle["self"] = cycle

    def allocate():
        gc.collect()
        torch.zeros(1 << 10)

    gc.disable()
    try:
        peak_above_start(leave_garbage, CPU)
        assert peak_above_start(allocate, CPU) == 4 << 10
    finally:
        gc.enable()


def test_spans_hold_what_is_allocated_between_marks():
    def work(mark):
        mark()
        first = torch.empty(1000)
        mark()
        second = torch.empty(500)
        del second
        mark()
        del first
        mark()

    growth = [
        (span.end_bytes - span.begin_bytes, span.peak_bytes - span.begin_bytes) for span in trace_spans(work, CPU)
    ]
    assert growth == [(4000.0, 4000.0), (0.0, 2000.0), (-4000.0, 0.0)]


def test_parameters_and_batches_are_not_counted_as_kept(tiny_model_file):
    model, batch = model_and_batch(tiny_model_file, 2)
    saved = layer_bytes(split(model), batch).saved
    assert saved[0] == 0.0, "an embedding keeps its indices, which are the batch's"


class WideNorm(nn.Module):
    """A norm that computes in 32 bits, and keeps its input so."""

    def forward(self, hidden):
        wide = hidden.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 1.0), (torch.float32, 0.0)])
def test_a_layer_that_keeps_its_input_in_wider_numbers_does_not_keep_what_it_was_given(tiny_model_file, dtype, share):
    model = load_object(f"{tiny_model_file}:Tiny")(num_blocks=2)
    for block in model.blocks:
        block.norm = WideNorm()
    chain, tokens = split(model.to(dtype)), torch.randint(32, (4, 16))
    found = layer_bytes(chain, (tokens, tokens))
    blocks = [index for index, layer in enumerate(chain.layers) if layer.kind == "block"]
    assert len(blocks) == 2
    assert [found.unkept_inputs[index] for index in blocks] == [share * found.outputs[index - 1] for index in blocks]
